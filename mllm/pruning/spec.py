"""A pruner as programs are told of it: `visiondrop tokens=3 positions=compacted`."""

import dataclasses
import shlex
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from mllm.errors import OptionError
from mllm.pruning.base import Pruner

WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    NoneType: "null",
}
"""How errors name a value's type."""


def read_spec(spec: str, methods: Mapping[str, type[Pruner]]) -> Pruner:
    """The pruner that a name and options after it stand for; values as YAML reads them.

    Example:
        read_spec("fastv tokens=0.25 layer=2", PRUNERS)

    Args:
        spec: A name of `methods`, then `option=value`, parted by blanks.
        methods: Classes by name.

    Raises:
        OptionError: No method of that name, no option of that name, or a value it cannot have.
    """
    name, *words = _words_of(spec)
    if name not in methods:
        raise OptionError(
            f"pruner {name!r}" if name else "a pruner without a name",
            expected=f"one of {', '.join(methods)}",
            do="name one of them first, its options behind it: 'visiondrop tokens=64'",
        )
    hints = get_type_hints(methods[name])
    defaults = {field.name: field.default for field in dataclasses.fields(methods[name]) if field.init}
    given: dict[str, Any] = {}
    for word in words:
        option, equals, text = word.partition("=")
        if not equals or option not in defaults or option in given:
            reason = "twice" if option in given else "which it does not have" if equals else "without a value"
            raise OptionError(
                f"pruner {name!r}: {option!r}, {reason}",
                expected="of each at most one: "
                + ", ".join(f"{option}={_written(value)}" for option, value in defaults.items()),
                do="correct the option, or leave it out",
            )
        given[option] = _value(text, hints[option], where=f"pruner {name!r}: {option}")
    return methods[name](**given)


def _words_of(spec: str) -> list[str]:
    try:
        return shlex.split(spec) or [""]
    except ValueError as error:  # a quotation mark without its other
        raise OptionError(f"pruner {spec!r}: {error}", expected="a name and options", do="correct it") from error


def _value(text: str, hint: Any, *, where: str) -> Any:
    """A value of the option's type.

    Raises:
        OptionError: The text is no such value.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    value = _tupled(value)
    if hint is float and type(value) is int:
        return float(value)
    if _fits(value, hint):
        return value
    if _fits(text, hint):  # a text that YAML takes for something else
        return text
    raise OptionError(f"{where} = {text}", expected=_described(hint), do="correct it")


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    kind, members = get_origin(hint), get_args(hint)
    if kind in (UnionType, Union):
        return any(_fits(value, one) for one in members)
    if kind is Literal:
        return value in members
    if kind is tuple:
        if not isinstance(value, tuple):
            return False
        each = [members[0]] * len(value) if members[-1] is Ellipsis else list(members)
        return len(each) == len(value) and all(_fits(one, own) for one, own in zip(value, each, strict=True))
    return type(value) is hint


def _described(hint: Any) -> str:
    kind, members = get_origin(hint), get_args(hint)
    if kind in (UnionType, Union):
        return " or ".join(map(_described, members))
    if kind is Literal:
        return f"one of {', '.join(map(str, members))}"
    if kind is tuple:
        return f"a list such as [1, 2], each {_described(members[0])}"
    return WORDS.get(hint, str(hint))


def _written(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "..."
    return yaml.safe_dump(_listed(value), default_flow_style=True).splitlines()[0]


def _listed(value: Any) -> Any:
    return [_listed(one) for one in value] if isinstance(value, tuple) else value
