"""Data sets of the Hugging Face Hub: which files belong to a configuration and a split, and their download."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from mllm.data.sources import Source
from mllm.errors import OptionError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".tar")
"""Of files that may hold records."""

NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
CARD = "README.md"

_hub_path = re.compile(r"hub:/{1,2}([^/]+/[^/]+)(?:/(.+))?")  # one slash is what `pathlib` leaves
_front_matter = re.compile(r"\A---\s*\n(.*?\n)---\s*(?:\n|\Z)", re.DOTALL)


def is_hub_path(path: str) -> bool:
    """Whether a source's path names a data set of the Hub: `hub://ORG/NAME`, or `hub://ORG/NAME/GLOB` of its files."""
    return path.startswith("hub:/")


def is_data_file(name: str) -> bool:
    """Whether a file may hold records, by its name."""
    return name.lower().endswith(SUFFIXES) and name not in NO_DATA and not name.startswith((".", "_"))


def hub_files(source: Source) -> list[Path]:
    """Download the data files of a source, and list them.

    Which they are, `hub://ORG/NAME/GLOB` says, or else the card's `configs`: those of `subset` (by default the card's
    default, or its only one) and of `split` (by default `train`, or the only one). Where the card has none, the files
    of a split are those with its name in theirs, inside the folder `subset` if there is one.

    Raises:
        OptionError: The id, the configuration or the split is wrong, or the Hub cannot be reached.
    """
    found = _hub_path.fullmatch(str(source.path))
    if not found:
        raise OptionError(f"data: {source.path}", expected="hub://ORG/NAME", do="correct `path` under `data`")
    name, inside = found.groups()
    if inside:
        return _download(name, [inside], source)
    card = download(name, revision=source.revision, patterns=[CARD]) / CARD
    configs = _configs(card) if card.is_file() else []
    if configs:
        return _download(name, _split_patterns(configs, source), source)
    folder = f"{source.subset}/" if source.subset else ""
    of_split = _download(name, _patterns(folder, source.split or "train"), source, is_required=bool(source.split))
    return of_split or _download(name, [f"{folder}*{suffix}" for suffix in SUFFIXES], source)


def download(name: str, *, revision: str, patterns: Sequence[str]) -> Path:
    """Download the files of a data set that match, and return the folder they are in.

    Raises:
        OptionError: It is not there, or the Hub cannot be reached.
    """
    try:
        folder = snapshot_download(name, repo_type="dataset", revision=revision or None, allow_patterns=list(patterns))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise OptionError(
            f"data: hub://{name} is not there, or not for everybody: {_first_line(error)}",
            expected="a data set of the Hub that you may read",
            do="correct the name; if its terms must be accepted, accept them on its page and run `hf auth login`",
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise OptionError(
            f"data: hub://{name} cannot be downloaded: {_first_line(error)}",
            expected=f"revision {revision or 'main'} on the Hub, or in the local cache",
            do="check the revision and the connection",
        ) from error
    return Path(folder)


def _download(name: str, patterns: Sequence[str], source: Source, *, is_required: bool = True) -> list[Path]:
    """The data files that match, in the order of the patterns, each once."""
    folder = download(name, revision=source.revision, patterns=patterns)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if is_data_file(path.name))
    # fnmatch's * goes over slashes, and so does the Hub's.
    chosen = dict.fromkeys(
        file for pattern in patterns for file in names if fnmatchcase(file, pattern.replace("**/", "*"))
    )
    if not chosen and is_required:
        raise OptionError(
            f"data: hub://{name} has no data files {', '.join(patterns)[:300]}",
            expected=f"files of the kinds {', '.join(SUFFIXES)}",
            do="name them: hub://ORG/NAME/FILE, or set `subset` and `split`",
        )
    return [folder / file for file in chosen]


def _patterns(folder: str, split: str) -> list[str]:
    """Patterns of the files whose name holds that of a split."""
    return [
        f"{folder}{before}{split}{after}{suffix}"
        for before in ("", "*/", "*[-._]")
        for after in ("", "[-._/]*")
        for suffix in SUFFIXES
    ]


def _configs(card: Path) -> list[dict[str, Any]]:
    found = _front_matter.match(card.read_text(encoding="utf-8", errors="replace"))
    try:
        content = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return []
    configs = content.get("configs") if isinstance(content, dict) else None
    return [config for config in configs or [] if isinstance(config, dict) and config.get("data_files")]


def _split_patterns(configs: list[dict[str, Any]], source: Source) -> list[str]:
    """The patterns of the configuration and the split that are meant, as the card has them."""
    by_name = {str(config.get("config_name", "default")): config for config in configs}
    default = next((name for name, config in by_name.items() if config.get("default")), "default")
    subset = source.subset or (next(iter(by_name)) if len(by_name) == 1 else default)
    config = by_name.get(subset)
    if config is None:
        raise _wrong("subset", source.subset, source, by_name)
    files = config["data_files"]
    if isinstance(files, str) or all(isinstance(entry, str) for entry in files):
        files = [{"split": "train", "path": files}]
    splits = {str(entry["split"]): entry["path"] for entry in files}
    split = source.split or (next(iter(splits)) if len(splits) == 1 else "train")
    if split not in splits:
        raise _wrong("split", source.split, source, splits)
    paths = [splits[split]] if isinstance(splits[split], str) else list(splits[split])
    folder = f"{config['data_dir']}/" if config.get("data_dir") else ""
    return [folder + str(path).removeprefix("./") for path in paths]


def _wrong(option: str, value: str, source: Source, choices: Any) -> OptionError:
    return OptionError(
        f"{option} = {value!r} of {source.path}",
        expected=f"one of {', '.join(choices)}",
        do=f"set `{option}`",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
