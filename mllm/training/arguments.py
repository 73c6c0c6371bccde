"""Reads the options of a training run once, from a YAML file and the command line; unknown keys are refused."""

import argparse
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

from mllm.data.mixture_file import read_mixture
from mllm.errors import OptionError
from mllm.training.argument_checks import check_batching, check_names, check_values, read_parts
from mllm.training.cross_tokens import check_cross_tokens, read_cross_tokens
from mllm.training.options import COMMON, UNSUPPORTED, SftArguments
from mllm.training.pruned_steps import check_step_pruner, read_step_pruner
from mllm.training.sharding import require_deepspeed

FLAGS = ("dry_run",)
"""Options of ours that may stand on the command line without a value."""

Arguments = TypeVar("Arguments", bound=SftArguments)

__all__ = ["UNSUPPORTED", "SftArguments", "build_arguments", "parse_arguments", "read_config"]


def parse_arguments(
    argv: Sequence[str],
    kind: type[Arguments] = SftArguments,
) -> Arguments:
    """Read `--config FILE` and the options that override it; `--help` shows ours first.

    Args:
        argv: The command line, without the program.
        kind: The program's options.

    Raises:
        OptionError: A key is unknown, or a value cannot be read.
    """
    parser = argparse.ArgumentParser(
        usage=f"{kind.program} --config FILE [--OPTION VALUE ...]", epilog=kind.example, description=kind.about,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", type=Path, help="YAML file with any of these options")
    parser.add_argument("--stage", help="which stage to run, where --config is a plan")
    own = kind.own()
    known = {option.name: option for option in fields(kind) if option.init}
    for title, names in (("options of mllm", own), ("often used options of TrainingArguments", COMMON)):
        group = parser.add_argument_group(title)
        for name in names:
            flag: dict[str, Any] = {"nargs": "?", "const": "true"} if name in FLAGS else {}
            group.add_argument(
                f"--{name}", metavar="VALUE", help=_help(known[name]), default=argparse.SUPPRESS, **flag
            )
    rest = parser.add_argument_group("all other options of TrainingArguments, by their names")
    for name in sorted(set(known) - set(own) - set(COMMON)):
        rest.add_argument(f"--{name}", help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    config, stage = given.pop("config"), given.pop("stage")
    options = read_config(config, stage=stage) if config else {}
    if config and "data_root" not in given:
        options.setdefault("data_root", str(config.parent))
    options |= {name: _read_yaml(value, f"--{name}") if name in own else value for name, value in given.items()}
    return build_arguments(options, kind, where=str(config) if config else "the command line")


def read_config(path: Path, *, stage: str | None = None) -> dict[str, Any]:
    """The options in a YAML file; of a plan, those of one stage, with the plan's model.

    Raises:
        OptionError: No such file, no mapping in it, or a plan without a choice of stage.
    """
    if not path.is_file():
        raise OptionError(f"--config {path} is not there", expected="a YAML file", do="correct the path")
    options = _read_yaml(path.read_text(encoding="utf-8"), f"--config {path}")
    if not isinstance(options, dict):
        raise OptionError(
            f"--config {path} holds {type(options).__name__}", expected="a mapping", do="write key: value"
        )
    if "stages" not in options:
        return options
    stages = {entry.get("name"): entry for entry in options["stages"] or () if isinstance(entry, dict)}
    if stage is None and len(stages) == 1:
        stage = next(iter(stages))
    if stage not in stages:
        raise OptionError(
            f"--config {path} is a plan, and --stage is {stage!r}",
            expected=f"one of {', '.join(map(str, stages))}",
            do="name it with --stage, or run the whole plan with train/run.py",
        )
    shared = {key: value for key, value in options.items() if key != "stages"}
    chosen = {key: value for key, value in stages[stage].items() if key not in ("name", "program")}
    return {"output_dir": f"runs/{path.stem}/{stage}", **shared, **chosen}


def build_arguments(
    options: Mapping[str, Any],
    kind: type[Arguments] = SftArguments,
    *,
    where: str,
) -> Arguments:
    """Typed arguments of a program from plain values.

    Raises:
        OptionError: A key is unknown (the nearest is named), required and missing, or its value cannot be read.
    """
    check_names(options, kind, where)
    if options.get("deepspeed"):
        require_deepspeed()
    plain = {name: value for name, value in options.items() if name not in kind.own() and value is not None}
    command = [item for name, value in plain.items() for item in _as_command(name, value)]
    try:
        parser = HfArgumentParser(kind, exit_on_error=False, allow_abbrev=False)
        typed = vars(parser.parse_args(command))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # gradient_checkpointing, by its name in every release
            arguments = kind(**{name: typed[name] for name in plain})
    except (argparse.ArgumentError, ValueError) as error:
        raise OptionError(f"{where}: {error}", expected="a value of the option's type", do="correct it") from error
    for name in kind.own():
        if name in options:
            setattr(arguments, name, options[name])
    check_values(arguments, where)
    check_batching(arguments, options, where)
    arguments.check(where)
    arguments.parts = read_parts(arguments.parts)
    arguments.cross_tokens = read_cross_tokens(arguments.cross_tokens, where)
    check_cross_tokens(arguments, where)
    arguments.pruner = read_step_pruner(arguments.pruner, where)
    check_step_pruner(arguments, where)
    shared = {"on_bad": arguments.on_bad, "max_bad_rate": arguments.max_bad_rate}
    arguments.data = read_mixture(arguments.data, root=arguments.data_root, shared=shared)
    if arguments.eval_data is not None:
        arguments.eval_data = read_mixture(arguments.eval_data, root=arguments.data_root, shared=shared)
    return arguments


def _as_command(name: str, value: Any) -> list[str]:
    """An option as the command line has it; lists become several words, mappings JSON."""
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]


def _read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise OptionError(f"{where}: {error}", expected="YAML", do="correct it") from error


def _help(option) -> str:
    text = str(option.metadata.get("help", "")).split("\n")[0].replace("%", "%%")
    default = option.default if option.default is not MISSING else None
    return text if default in (None, "") else f"{text} Default: {default}".replace("%", "%%").replace("%%%%", "%%")
