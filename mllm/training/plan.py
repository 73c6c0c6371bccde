"""A plan: one YAML that assembles a model and trains it in stages, read and checked whole before anything starts."""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mllm.assemble import assembly_options
from mllm.assemble.mixed import encoder_paths
from mllm.data.mixture_file import open_mixture
from mllm.errors import OptionError
from mllm.load import ADAPTER_CONFIG
from mllm.models.parts import check_options
from mllm.training.arguments import SftArguments, build_arguments
from mllm.training.checkpoint import FINAL
from mllm.training.preference_options import PreferenceArguments

PART_NAMES = ("image.encoder", "image.connector", "audio.encoder", "audio.connector", "video.connector", "text")
"""The parts of models that `assemble` makes, as far as they have these towers."""

SETTLED = ("model", "output_dir", "resume_from_checkpoint")
"""Options of a stage that the plan settles."""

STAGE_YAML = "stage.yaml"

PROGRAMS: dict[str, type[SftArguments]] = {"sft": SftArguments, "rdpo": PreferenceArguments}
"""What a stage may be run by, `train/NAME.py`, and the options that it takes."""


@dataclass(frozen=True)
class Stage:
    """One training run of a plan.

    Args:
        name: Its name, and its directory's.
        directory: Where it writes.
        model: The directory it starts from; with an adapter there, `starting_model` merges it into `directory/base`.
        options: All its options as plain values, as they are written to `stage.yaml`.
        given: The names of those that the plan, its defaults or `--set` state.
        arguments: The same, typed.
        data: What every source is, see `Mixture.fingerprints`.
        program: One of `PROGRAMS`.
    """

    name: str
    directory: Path
    model: Path
    options: dict[str, Any]
    given: tuple[str, ...]
    arguments: SftArguments
    data: list[dict[str, Any]]
    program: str = "sft"

    @property
    def final(self) -> Path:
        """The trained model."""
        return self.directory / FINAL

    @property
    def config(self) -> Path:
        """The resolved options, ready for the `--config` of its program."""
        return self.directory / STAGE_YAML


@dataclass(frozen=True)
class Plan:
    """A plan, resolved.

    Args:
        path: The YAML it was read from.
        output_dir: Where everything is written.
        model: Options of `assemble`; None where the first stage starts from a checkpoint.
        stages: In the order they run.
    """

    path: Path
    output_dir: Path
    model: dict[str, Any] | None
    stages: tuple[Stage, ...]

    @property
    def assembled(self) -> Path:
        """Where the parts are joined."""
        return self.output_dir / "assembled"


def read_plan(
    path: Path,
    *,
    output_dir: Path,
    data_root: Path | None = None,
    changes: Sequence[str] = (),
    progress: Callable[[int], Any] | None = None,
) -> Plan:
    """Read a plan, change it as `--set` says, and check every stage of it, its data last. Nothing is written.

    Local directories under `model` are relative to the current directory, as Hub ids are looked up without one; row
    files are relative to `data_root`, by default the plan's own directory.

    Args:
        path: The YAML file: `model`, `stages`, and options that all stages share.
        output_dir: Where the stages will write, each in a directory of its name.
        data_root: What relative paths under `data` are relative to.
        changes: `key.path=value` each, see `apply_change`.
        progress: Told how many more records of data have been read, where they were not read before.

    Raises:
        OptionError: An unknown key, part or mode, a value that cannot be read, a bad stage name, a missing file.
        RowError, MediaError: Broken data, where the plan does not say `on_bad: quarantine`.
    """
    document = _read_document(path)
    for change in changes:
        apply_change(document, change)
    _check_stages(document, where=path)
    shared = {key: value for key, value in document.items() if key not in ("model", "stages")}
    output_dir = output_dir.resolve()
    model, start = _read_model(document.get("model"), output_dir, where=path)
    names = _stage_names(document["stages"], where=path)

    stages: list[Stage] = []
    for name, entry in zip(names, document["stages"], strict=True):
        where = f"{path}, stage {name!r}"
        program = _program(entry, where=where)
        own = shared | {key: value for key, value in entry.items() if key not in ("name", "program")}
        for key in SETTLED:
            if key in own:
                raise OptionError(
                    f"`{key}` in {where}",
                    expected="a stage without it: each starts from the stage before, in a directory of its name",
                    do="remove it; `model:` at the top says what the first stage starts from",
                )
        root = Path(data_root or own.get("data_root") or path.parent).resolve()
        begins = stages[-1].final if stages else start
        options = own | {
            "model": str(begins), "data_root": str(root), "output_dir": str(output_dir / name)
        }  # fmt: skip
        arguments = build_arguments(options, PROGRAMS[program], where=where)
        check_options(_part_names(document.get("model")), arguments.parts)
        stages.append(Stage(name, output_dir / name, begins, options, tuple(own), arguments, [], program))
    return Plan(path, output_dir, model, tuple(_with_data(stage, progress) for stage in stages))


def _program(entry: Mapping[str, Any], *, where: str) -> str:
    program = entry.get("program", "sft")
    if program not in PROGRAMS:
        raise OptionError(
            f"program = {program!r} in {where}",
            expected=f"one of {', '.join(PROGRAMS)}: which of train/*.py runs the stage",
            do="correct it, or remove it for sft",
        )
    return program


def _with_data(stage: Stage, progress: Callable[[int], Any] | None) -> Stage:
    mixture = open_mixture(stage.arguments.data, seed=stage.arguments.seed, progress=progress)
    return replace(stage, data=mixture.fingerprints())


def apply_change(document: dict[str, Any], change: str) -> None:
    """Set one value in a plan as read from YAML, in place.

    `seed=1`, `model.image.encoder=DIR`, `stages.align.max_steps=10`, `stages.sft.parts.text.rank=8`: stages by their
    names, the value as YAML reads it. All but the last key have to be there; the last may be new, and is checked with
    the stage it ends up in.

    Raises:
        OptionError: No `=`, no such key, or a key inside something that has none.
    """
    path, equals, text = change.partition("=")
    if not equals or not path.strip("."):
        raise OptionError(f"--set {change!r}", expected="key.path=value", do="write, e.g., --set stages.sft.seed=1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise OptionError(f"--set {change!r}: {error}", expected="a value in YAML", do="quote it") from error
    here: Any = document
    rest, passed = path, ""
    while True:
        if isinstance(here, list):  # the stages
            here = {entry.get("name"): entry for entry in here if isinstance(entry, dict)}
        key = _next_key(here, rest)
        is_last = key == rest
        if key is None or (is_last and passed == "stages"):
            found = ", ".join(map(str, here)) if isinstance(here, Mapping) else f"the value {here!r}"
            raise OptionError(
                f"--set {path}: no {rest!r} under {passed or 'the plan'}",
                expected=f"a key below it; there is {found}",
                do="correct the path, or set the mapping above it as a whole: --set 'key={a: 1, b: 2}'",
            )
        if is_last:
            here[key] = value
            return
        here, rest, passed = here[key], rest[len(key) + 1 :], f"{passed}.{key}".lstrip(".")


def _next_key(here: Any, rest: str) -> str | None:
    """The longest key that `rest` begins with (names of parts have dots); where none does, `rest` if it may be new."""
    if not isinstance(here, Mapping):
        return None
    known = [str(key) for key in here if rest == key or rest.startswith(f"{key}.")]
    if known:
        return max(known, key=len)
    return rest if "." not in rest or rest in PART_NAMES else None


def _read_document(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise OptionError(f"{path} is not there", expected="the YAML file of a plan", do="correct the path")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise OptionError(f"{path}: {error}", expected="YAML", do="correct it") from error
    _check_stages(document, where=path)
    return copy.deepcopy(document)  # what two stages share through a YAML anchor must not change together


def _check_stages(document: Any, *, where: Path) -> None:
    stages = document.get("stages") if isinstance(document, dict) else None
    if not isinstance(stages, list) or not stages or not all(isinstance(entry, dict) for entry in stages):
        raise OptionError(
            f"{where} is no plan",
            expected="a mapping with `model` and `stages`, a list of mappings with a `name` each",
            do="see the example in `train/run.py --help`; a single stage is started with train/sft.py",
        )


def _read_model(model: Any, output_dir: Path, *, where: Path) -> tuple[dict[str, Any] | None, Path]:
    """The options of `assemble`, if there are any, and the directory the first stage starts from."""
    if isinstance(model, str):
        start = Path(model).resolve()
        if not any((start / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            raise OptionError(
                f"model = {model!r} in {where} holds no checkpoint",
                expected="a mapping of parts to assemble, or the directory of a model or an adapter",
                do="correct `model`; a run leaves its model in OUTPUT_DIR/final",
            )
        return None, start
    given = assembly_options(model if isinstance(model, dict) else {}, where=str(where))
    paths = [("language_model", given["language_model"])]
    for kind in ("image", "audio"):
        if given.get(kind):
            paths += [(f"{kind}.encoder", path) for path in encoder_paths(given[kind]["encoder"])]
    for key, path in paths:
        if _looks_local(path) and not Path(path).is_dir():
            raise OptionError(
                f"model: {key} = {path!r} is not there",
                expected="a directory (relative ones are relative to the current directory) or a Hub id",
                do=f"correct it, or --set model.{key}=DIRECTORY",
            )
    return given, output_dir / "assembled"


def _part_names(model: Any) -> tuple[str, ...]:
    """The parts that can be trained: those of the towers there are, or all where the model is a directory."""
    if not isinstance(model, dict):
        return PART_NAMES
    return tuple(name for name in PART_NAMES if name == "text" or model.get(name.split(".")[0]))


def _looks_local(path: Any) -> bool:
    return str(path).startswith((".", "/", "~")) or str(path).count("/") > 1


def _stage_names(entries: Sequence[Mapping[str, Any]], *, where: Path) -> list[str]:
    names = [entry.get("name") for entry in entries]
    for index, name in enumerate(names):
        is_safe = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name)
        is_taken = str(name).casefold() in ("assembled", *(str(other).casefold() for other in names[:index]))
        if not is_safe or is_taken:
            raise OptionError(
                f"stage {index + 1} of {where} has the name {name!r}" + (", which is taken" if is_taken else ""),
                expected="a name of letters, digits, - and _ that no other stage has; it is a directory's name",
                do="rename it",
            )
    return [str(name) for name in names]
