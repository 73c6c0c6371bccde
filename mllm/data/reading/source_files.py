"""Which files a source stands for: a file, a directory, a glob, a brace list, a saved data set, a Hub id."""

import glob
import itertools
import json
import re
from pathlib import Path

from mllm.data.importers.llama_factory_info import resolve
from mllm.data.reading.hub import SUFFIXES, hub_files, is_data_file, is_hub_path
from mllm.data.sources import Source
from mllm.errors import OptionError

_braces = re.compile(r"\{([^{}]*)\}")
_range = re.compile(r"(\d+)\.\.(\d+)")


def source_files(source: Source) -> list[Path]:
    """The files of a source, in the order in which their records are read.

    A directory stands for the data files right in it, which must be of one kind, or for what `datasets.save_to_disk`
    wrote there; a `dataset_info.json` of LLaMA-Factory for the file of its entry.

    Raises:
        OptionError: There are none, they are of several kinds, or one is no regular file.
    """
    source = resolve(source)
    text = str(source.path)
    if is_hub_path(text):
        files = hub_files(source)
    elif Path(text).is_dir():
        files = _directory_files(Path(text), source)
    elif Path(text).exists() or not re.search(r"[*?\[{]", text):
        files = [Path(text)]
    else:
        files = list(itertools.chain.from_iterable(map(_matching, expand_braces(text))))
    for file in files:
        if not file.is_file():
            problem = "is no regular file" if file.exists() else "is not there"
            raise _no_files(f"{file} {problem}")
    if not files:
        raise _no_files(f"{text} stands for no file")
    return files


def expand_braces(text: str) -> list[str]:
    """Write out `{a,b}` and `{000..012}`.

    Example: "x{a,b}-{8..10}" gives xa-8, xa-9, xa-10, xb-8, xb-9, xb-10.
    """
    found = _braces.search(text)
    if not found:
        return [text]
    if numbers := _range.fullmatch(found[1]):
        first, last = numbers.groups()
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        choices = [choice.strip() for choice in found[1].split(",")]
    rests = expand_braces(text[found.end() :])
    return [text[: found.start()] + choice + rest for choice in choices for rest in rests]


def _matching(text: str) -> list[Path]:
    if Path(text).exists() or not glob.has_magic(text):
        return [Path(text)]
    return sorted(Path(name) for name in glob.glob(text, recursive=True) if not Path(name).is_dir())


def _directory_files(folder: Path, source: Source) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        return _saved_files(folder / _split_of(folder, source))
    if (folder / "state.json").is_file():
        return _saved_files(folder)
    files = sorted(file for file in folder.iterdir() if is_data_file(file.name))
    kinds = sorted({file.suffix.lower() for file in files})
    if len(kinds) > 1:
        raise OptionError(
            f"data: {folder} holds files of the kinds {', '.join(kinds)}",
            expected="data files of one kind",
            do=f"name them, such as {folder / ('*' + kinds[0])}",
        )
    return files


def _split_of(folder: Path, source: Source) -> str:
    """The split of a saved `DatasetDict` that is meant."""
    splits = _read_object(folder / "dataset_dict.json").get("splits") or []
    if source.split in splits:
        return source.split
    if not source.split and len(splits) == 1:
        return splits[0]
    raise OptionError(
        f"data: split = {source.split!r} of {folder}",
        expected=f"one of {', '.join(map(str, splits))}",
        do="set `split`",
    )


def _saved_files(folder: Path) -> list[Path]:
    """The files of `datasets.save_to_disk`, in order."""
    state = _read_object(folder / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise OptionError(
            f"data: {folder} was saved with an index over its rows",
            expected="a data set as datasets >= 2 saves it",
            do="load it with `datasets`, and save it again after `flatten_indices()`",
        )
    return [folder / entry["filename"] for entry in state.get("_data_files") or []]


def _read_object(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise OptionError(f"data: {path} cannot be read: {error}", expected="a JSON object", do="mend it") from error
    if not isinstance(content, dict):
        raise OptionError(f"data: {path} is a {type(content).__name__}", expected="a JSON object", do="mend it")
    return content


def _no_files(found: str) -> OptionError:
    return OptionError(
        f"data: {found}",
        expected=f"a file ({', '.join(SUFFIXES)}), a directory, a glob, a list such as {{a,b}}.json, or hub://ORG/NAME",
        do="correct `path` under `data`; relative paths are relative to the YAML file, or to --data_root",
    )
