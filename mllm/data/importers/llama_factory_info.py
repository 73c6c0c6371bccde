"""`dataset_info.json`: where LLaMA-Factory writes which file is in which form, and how its columns are called.

A source has the entry that its `subset` names, or `ENTRY` in a path such as "data/dataset_info.json#ENTRY", or the one
whose `file_name` is its file. The `dataset_info.json` is the source's own path, or lies beside the data, or in their
directory; data elsewhere name it in the option `dataset_info`, in the same way. `num_samples` is not read: `take` of a
source says how many rows.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from mllm.data.sources import Source
from mllm.errors import OptionError

INFO = "dataset_info.json"
OPTION = "dataset_info"

COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
}
"""Where an entry names no columns."""

TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
"""Where an entry names no tags."""

_NAMES = (
    *("prompt", "query", "response", "history", "messages", "system", "tools"),
    *("images", "videos", "audios", "chosen", "rejected", "kto_tag"),
)


@dataclass(frozen=True)
class Entry:
    """One entry.

    Args:
        name: Its key; "" where nothing describes the data, which then are in the alpaca form.
        formatting: "alpaca" or "sharegpt".
        is_ranking: Whether its records are pairs of answers.
        columns: Column of each thing that has one.
        tags: Keys and values of messages.
        file_name: Its file or folder, relative to the `dataset_info.json`; "" for data on the Hub.
        hub: Hub id of the data.
        subset: Their configuration there.
        split: Their split there.
    """

    name: str = ""
    formatting: str = "alpaca"
    is_ranking: bool = False
    columns: Mapping[str, str] = field(default_factory=lambda: COLUMNS["alpaca"])
    tags: Mapping[str, str] = field(default_factory=lambda: TAGS)
    file_name: str = ""
    hub: str = ""
    subset: str = ""
    split: str = ""


def resolve(source: Source) -> Source:
    """The source of the data themselves, where the path is a `dataset_info.json`; else the source as it is.

    Raises:
        OptionError: There is no such entry, or it names no data that can be read.
    """
    if not _is_info(str(source.path)):
        return source
    entry = entry_of(source)
    info, _, _ = str(source.path).partition("#")
    source = replace(
        source, format=source.format or "llama_factory", options={**source.options, OPTION: f"{info}#{entry.name}"}
    )
    if entry.file_name:
        return replace(source, path=Path(info).parent / entry.file_name, subset="")
    if entry.hub:
        return replace(source, path=f"hub://{entry.hub}", subset=entry.subset, split=source.split or entry.split)
    raise OptionError(
        f"entry {entry.name!r} of {info} has neither file_name nor hf_hub_url",
        expected="a file beside it, or a data set on the Hub",
        do="download the data, and name its file",
    )


def is_described(source: Source) -> bool:
    """Whether a `dataset_info.json` has an entry for the source: then the source is LLaMA-Factory's."""
    info = info_file(source)
    if info is None:
        return False
    try:
        entries = _read(info)
    except OptionError:
        return False  # `datasets` has files of this name, too
    name = _named_info(source).partition("#")[2] or source.subset
    return name in entries if name else bool(_names_of(entries, info, str(source.path)))


def entry_of(source: Source) -> Entry:
    """The entry that describes the source's records; the defaults of the alpaca form where nothing does.

    Raises:
        OptionError: The `dataset_info.json` cannot be read, or has no such entry.
    """
    info, path = info_file(source), str(source.path)
    name = _named_info(source).partition("#")[2] or source.subset
    if info is None and name and not path.startswith("hub://"):
        raise OptionError(
            f"entry {name!r}, and no {INFO} beside {path}",
            expected=f"a {INFO} with that entry",
            do=f"put it there, or name it in the option `{OPTION}`, as .../{INFO}#ENTRY",
        )
    if info is None:
        return Entry()
    return _find(info, info.stat().st_mtime_ns, name, "" if _is_info(path) else path)


def info_file(source: Source) -> Path | None:
    """The `dataset_info.json` that goes with a source: its content, too, decides what the rows are.

    Raises:
        OptionError: It is named, and not there.
    """
    if named := _named_info(source):
        path = Path(named.partition("#")[0])
        if not path.is_file():
            raise OptionError(f"{path} is not there", expected=f"a {INFO}", do="correct the path")
        return path
    if str(source.path).startswith("hub://"):
        return None
    path = Path(source.path)
    return next((file for file in (path.parent / INFO, path / INFO) if file.is_file()), None)


def _named_info(source: Source) -> str:
    path = str(source.path)
    return path if _is_info(path) else str(source.options.get(OPTION) or "")


def _is_info(path: str) -> bool:
    return Path(path.partition("#")[0]).name == INFO


@lru_cache(maxsize=64)
def _find(info: Path, modified: int, name: str, data: str) -> Entry:
    """The named entry, or the one of the data file; `modified` makes a changed `dataset_info.json` another one."""
    entries = _read(info)
    if not name and data:
        names = _names_of(entries, info, data)
        if not names:
            return Entry()
        if len(names) > 1:
            raise OptionError(f"{data} has the entries {', '.join(names)}", expected="one", do="name one as `subset`")
        name = names[0]
    if name not in entries:
        raise OptionError(
            f"no entry {name!r} in {info}", expected=f"one of {', '.join(sorted(entries))}", do="name one as `subset`"
        )
    return _parse(name, entries[name], info)


def _names_of(entries: Mapping[str, Any], info: Path, data: str) -> list[str]:
    """The entries of a data file."""
    path = os.path.abspath(data)
    return [
        name for name, entry in entries.items() if os.path.abspath(info.parent / str(entry.get("file_name"))) == path
    ]


def _read(info: Path) -> dict[str, Any]:
    try:
        entries = json.loads(info.read_bytes())
    except ValueError as error:
        raise OptionError(f"{info}: {error}", expected="a JSON object of entries", do="mend the file") from error
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise OptionError(f"{info} holds no entries", expected="an object of objects, by name", do="mend the file")
    return entries


def _parse(name: str, entry: Mapping[str, Any], info: Path) -> Entry:
    formatting = entry.get("formatting") or "alpaca"
    if formatting not in COLUMNS:
        raise OptionError(
            f"{info}, entry {name!r}: formatting = {formatting!r}",
            expected=f"one of {', '.join(COLUMNS)}",
            do="convert the data to one of them",
        )
    # As LLaMA-Factory has it: `columns` and `tags` replace all defaults, not only those that they name.
    columns, tags = entry.get("columns"), entry.get("tags")
    return Entry(
        name=name,
        formatting=formatting,
        is_ranking=bool(entry.get("ranking")),
        columns=COLUMNS[formatting] if columns is None else _named(columns, _NAMES),
        tags=TAGS if tags is None else {"role_tag": "from", "content_tag": "value"} | _named(tags, tuple(TAGS)),
        file_name=str(entry.get("file_name") or ""),
        hub=str(entry.get("hf_hub_url") or ""),
        subset=str(entry.get("subset") or ""),
        split=str(entry.get("split") or ""),
    )


def _named(mapping: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, str]:
    return {key: str(mapping[key]) for key in names if mapping.get(key)}
