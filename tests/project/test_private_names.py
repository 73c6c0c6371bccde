"""Every private name of another library that mllm touches is listed, exists, and is still used."""

import ast
import importlib
import inspect
import pkgutil
import sys
from pathlib import Path

import pytest

import mllm
from mllm.private_names import PRIVATE_NAMES

FILES = sorted(path for path in Path(mllm.__file__).parent.rglob("*.py") if path.name != "private_names.py")
LISTED = {name.attribute.split(".")[-1] for name in PRIVATE_NAMES}
SET_BY_OTHERS = {
    "_abc_impl",
    "_backward_cls",
    "_can_set_attn_implementation_cached_value",
    "_can_set_experts_implementation_cached_value",
}
"""What Python, torch and transformers put on the classes that they meet."""


@pytest.mark.parametrize("name", PRIVATE_NAMES, ids=lambda name: f"{name.module}.{name.attribute}")
def test_listed_name_exists(name):
    found = importlib.import_module(name.module)
    *owners, last = name.attribute.split(".")
    for owner in owners:
        found = getattr(found, owner)
    if hasattr(found, last) or last in getattr(found, "__annotations__", {}):
        return
    # Set on instances only: then the class's source says so.
    assert inspect.isclass(found), f"{name.module} has no {name.attribute}"
    assert f"self.{last} =" in inspect.getsource(found), f"{name.module} has no {name.attribute}"


@pytest.mark.parametrize("name", PRIVATE_NAMES, ids=lambda name: f"{name.module}.{name.attribute}")
def test_listed_name_is_private_used_and_explained(name):
    last = name.attribute.split(".")[-1]
    assert _is_private(last) or any(_is_private(part) for part in name.module.split("."))
    assert any(last in path.read_text(encoding="utf-8") for path in FILES), "no longer used: take it off the list"
    assert name.reason


def test_every_foreign_private_name_read_is_listed():
    """What is imported or read with an underscore is bound somewhere in mllm, or listed."""
    bound, read = set(), {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            bound |= _bound_names(node)
            for name in _read_names(node):
                read.setdefault(name, f"{path}:{node.lineno}")
    assert {name: place for name, place in read.items() if _is_private(name) and name not in bound | LISTED} == {}


def test_every_foreign_private_name_overridden_is_listed():
    """An override of a private name goes dead without a word when the library renames it."""
    overridden = set()
    for cls in _our_classes():
        for name in filter(_is_private, vars(cls).keys() - SET_BY_OTHERS):
            owners = [base for base in cls.__mro__[1:] if name in vars(base) and _is_foreign(base)]
            overridden |= {f"{owner.__module__}:{owner.__qualname__}.{name}" for owner in owners[:1]}
    assert {name for name in overridden if name.split(".")[-1] not in LISTED} == set()


def _is_private(name: str) -> bool:
    return name.startswith("_") and name != "_" and not name.startswith("__")


def _bound_names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return {node.id}
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname for alias in node.names if alias.asname}
    return set()


def _read_names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Attribute):
        return {node.attr}
    if isinstance(node, ast.ImportFrom):
        return {alias.name for alias in node.names} | set((node.module or "").split("."))
    if isinstance(node, ast.Import):
        return {part for alias in node.names for part in alias.name.split(".")}
    return set()


def _our_classes() -> set[type]:
    names = [module.name for module in pkgutil.walk_packages(mllm.__path__, "mllm.")]
    modules = [importlib.import_module(name) for name in names]
    classes = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    return {cls for cls in classes if not _is_foreign(cls)}


def _is_foreign(cls: type) -> bool:
    top = cls.__module__.split(".")[0]
    return top != "mllm" and top not in sys.stdlib_module_names
