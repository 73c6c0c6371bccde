"""`data:` of a configuration, and the files it names: lists of sources, with what holds for all of them."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mllm.data.indexing.index import open_index
from mllm.data.mixture import Mixture, parse_take
from mllm.data.schema import COORDINATES
from mllm.data.sources import ON_BAD, Source
from mllm.errors import OptionError

TEXTS = ("path", "format", "name", "subset", "split", "revision", "coordinates", "licence", "take", "on_bad")
MAPPINGS = ("remap", "columns", "options")
NUMBERS = ("weight", "max_bad_rate")
SOURCE_KEYS = tuple(field.name for field in dataclasses.fields(Source))
SHARED_KEYS = ("media_root", "remap", "on_bad", "max_bad_rate")
"""Keys of a source that may stand beside `sources:` or `mixture:` and then hold for all of them."""

MIXTURE_KEYS = ("temperature", "epoch_rows", *SHARED_KEYS)
LLAVA_NEXT = {"json_path": "path", "sampling_strategy": "take"}
"""Keys of a source in a mixture file of LLaVA-NeXT, and ours."""


@dataclass(frozen=True)
class MixtureOptions:
    """What `data:` says.

    Args:
        sources: In the order they are named.
        temperature: See `mllm.data.order.weighted_order`.
        epoch_rows: Length of an epoch, None for that of all sources together.
    """

    sources: tuple[Source, ...]
    temperature: float | None = None
    epoch_rows: int | None = None


def read_mixture(
    data: Any, *, root: str | Path | None = None, shared: Mapping[str, Any] | None = None
) -> MixtureOptions:
    """`data:` as sources.

    A list of paths or of mappings with the keys of `Source` (`first: N` stands for `take: first:N`); a mapping with
    `sources:`, such a list, and with `MIXTURE_KEYS`; or `{mixture: FILE.yaml}`, a file that holds one of these, or a
    mixture of LLaVA-NeXT (`datasets:` of `json_path` and `sampling_strategy`). What stands beside `mixture:` replaces
    what the file says for all its sources.

    Args:
        data: As read from YAML.
        root: What relative paths are relative to. Paths in a mixture file are relative to that file.
        shared: Values of `SHARED_KEYS` where neither a source nor the mixture states its own.

    Raises:
        OptionError: Another form, an unknown key, or a value of another type.
    """
    if isinstance(data, MixtureOptions):
        return data
    listed, own, root, where = _unfold(data, Path(root or "."), "data")
    for key, is_right, expected in (
        ("temperature", lambda value: _is_number(value) and value > 0, "a number above 0"),
        ("epoch_rows", lambda value: type(value) is int and value > 0, "a whole number from 1"),
    ):
        if own.get(key) is not None and not is_right(own[key]):
            raise OptionError(f"{where}: {key} = {own[key]!r:.60}", expected=expected, do="correct it")
    for_all = dict(shared or {}) | {key: own[key] for key in SHARED_KEYS if own.get(key) is not None}
    sources = tuple(_read_source(entry, root, for_all, where) for entry in listed)
    temperature = own.get("temperature")
    return MixtureOptions(sources, None if temperature is None else float(temperature), own.get("epoch_rows"))


def open_mixture(options: MixtureOptions, *, seed: int = 0, progress: Callable[[int], Any] | None = None) -> Mixture:
    """Open every source, which indexes those that are new or have changed.

    Args:
        options: What `read_mixture` read.
        seed: Decides which rows `take: random:N` takes.
        progress: Told how many more records have been read.

    Raises:
        OptionError: A source is not there, or has no rows.
        RowError, MediaError: It has rows that are broken, more than it may have.
    """
    indexes = [open_index(source, progress=progress) for source in options.sources]
    return Mixture(indexes, temperature=options.temperature, epoch_rows=options.epoch_rows, seed=seed)


def _unfold(data: Any, root: Path, where: str) -> tuple[list[Any], dict[str, Any], Path, str]:
    """The entries, what holds for all of them, and what their paths are relative to."""
    if isinstance(data, list) and data:
        return data, {}, root, where
    kinds = {"mixture", "sources", "datasets"} & set(data) if isinstance(data, dict) else set()
    if len(kinds) != 1 or (where != "data" and kinds == {"mixture"}):  # a file that names a file may name itself
        raise OptionError(
            f"{where} = {data!r:.80}",
            expected="a list of paths or mappings, a mapping with `sources` (or LLaVA-NeXT's `datasets`), or "
            "{mixture: FILE.yaml}",
            do="see the example in --help",
        )
    (kind,) = kinds
    own = {key: value for key, value in data.items() if key != kind}
    _check_keys(own, MIXTURE_KEYS, where)
    if own.get("media_root") is not None:
        _check_value("media_root", own["media_root"], where)
        own["media_root"] = root / own["media_root"]
    if kind == "mixture":
        path = _mixture_path(data[kind], root)
        listed, inner, root, where = _unfold(_read_yaml(path), path.parent, str(path))
        return listed, inner | own, root, where
    listed = data[kind]
    if not isinstance(listed, list) or not listed:
        raise OptionError(f"{where}: {kind} = {listed!r:.80}", expected="a list of sources", do="add sources")
    if kind == "datasets":
        listed = [source for entry in listed for source in _from_llava_next(entry, where)]
    return listed, own, root, where


def _read_source(entry: Any, root: Path, shared: dict[str, Any], where: str) -> Source:
    if isinstance(entry, Source):
        return entry
    given = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(given, dict) or not isinstance(given.get("path"), str) or not given["path"]:
        raise OptionError(f"{where}: {entry!r:.80}", expected="a path, or a mapping with `path`", do="correct it")
    where = f"{where}: {given['path']}"
    _check_keys(given, (*SOURCE_KEYS, "first"), where)
    given = shared | {key: value for key, value in given.items() if value is not None}
    if "first" in given:
        given = _with_take(given, where)
    for key, value in given.items():
        _check_value(key, value, where)
    parse_take(given.get("take", "all"))
    given |= {key: float(given[key]) for key in NUMBERS if key in given}
    given["path"] = resolve_path(given["path"], root)
    if "media_root" in given:
        given["media_root"] = root / given["media_root"]
    try:
        return Source(**given)
    except OptionError as error:
        raise OptionError(f"{where}: {error.found}", expected=error.expected, do=error.do) from error


def resolve_path(path: str, root: Path) -> str | Path:
    """A path below `root`; a Hub id or a URL ("hub://", "s3://") is as it is."""
    return path if re.match(r"[a-z0-9+.-]+://", path) else root / path


def _with_take(given: dict[str, Any], where: str) -> dict[str, Any]:
    """`first: N`, the older form of `take: first:N`."""
    first = given["first"]
    if "take" in given or type(first) is not int or first < 1:
        raise OptionError(
            f"{where}: first = {first!r}" + (" beside `take`" if "take" in given else ""),
            expected="a whole number from 1, and no `take`",
            do="write `take: first:N`",
        )
    return {key: value for key, value in given.items() if key != "first"} | {"take": f"first:{first}"}


def _check_value(key: str, value: Any, where: str) -> None:
    if key in TEXTS:
        is_right, expected = isinstance(value, str), "a text"
    elif key in MAPPINGS:
        is_right, expected = isinstance(value, Mapping), "a mapping"
    elif key in NUMBERS:
        is_right, expected = _is_number(value), "a number"
    else:
        is_right, expected = isinstance(value, str | Path), "a directory"
    choices = {"on_bad": ON_BAD, "coordinates": ("", *COORDINATES)}.get(key)
    if is_right and choices and value not in choices:
        is_right, expected = False, f"one of {', '.join(choice for choice in choices if choice)}"
    if is_right and key == "weight" and not value > 0:
        is_right, expected = False, "more than 0"
    if not is_right:
        raise OptionError(f"{where}: {key} = {value!r:.60}", expected=expected, do=f"correct `{key}`")


def _check_keys(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise OptionError(
                f"{where}: unknown key {key!r}",
                expected=f"some of {', '.join(known)}",
                do=f"write `{near[0]}`, if that was meant" if near else "remove it, or correct its name",
            )


def _mixture_path(given: Any, root: Path) -> Path:
    path = root / given if isinstance(given, str) and given else None
    if path is None or not path.is_file():
        raise OptionError(
            f"data: mixture: {path or given} is not there", expected="a YAML file", do="correct the path"
        )
    return path


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: {error}", expected="YAML", do="correct it") from error


def _from_llava_next(entry: Any, where: str) -> list[dict[str, Any]]:
    """One entry of LLaVA-NeXT's `datasets:`; "/data/{a,b}.json" are two sources."""
    if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str):
        raise OptionError(f"{where}: datasets: {entry!r:.80}", expected="a mapping with `json_path`", do="correct it")
    _check_keys(entry, (*LLAVA_NEXT, *(key for key in SOURCE_KEYS if key not in ("path", "take"))), where)
    ours: dict[str, Any] = {LLAVA_NEXT.get(str(key), str(key)): value for key, value in entry.items()}
    return [ours | {"path": path} for path in expand_braces(ours["path"])]


def expand_braces(path: str) -> list[str]:
    """Example: "/data/{a,b}.json" gives "/data/a.json" and "/data/b.json"; a path without braces itself."""
    match = re.fullmatch(r"([^{]*)\{([^{}]*)\}(.*)", path)
    if match is None:
        return [path]
    before, names, behind = match[1], match[2], match[3]
    return [f"{before}{name.strip()}{rest}" for name in names.split(",") for rest in expand_braces(behind)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
