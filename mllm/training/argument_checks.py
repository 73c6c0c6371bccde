"""Checks of options: names, values, and what is said of each part."""

import difflib
import importlib.util
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from mllm.errors import OptionError
from mllm.models.parts import PartOptions
from mllm.training.options import COUNTS, SERVICE_PACKAGES, UNSUPPORTED, SftArguments


def check_names(options: Mapping[str, Any], kind: type[SftArguments], where: str) -> None:
    """Every name is an option, and those without which there is no run are there.

    Raises:
        OptionError: One is unknown (the nearest is named), or missing.
    """
    known = [option.name for option in fields(kind) if option.init]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise OptionError(
                f"unknown option {name!r} in {where}",
                expected=f"an option that `{kind.program} --help` lists, or one of transformers' TrainingArguments",
                do=f"write `{near[0]}`, if that was meant" if near else "remove it, or correct its name",
            )
    for name in ("model", "data", "output_dir"):
        if not options.get(name):
            raise OptionError(f"no `{name}` in {where}", expected=f"a value for `{name}`", do=f"add `{name}`")


def check_values(arguments: SftArguments, where: str) -> None:
    """What `HfArgumentParser` does not check: our options, and those of transformers that would not be honoured.

    Raises:
        OptionError: A value that the option cannot have.
    """
    for name, choices in arguments.choices().items():
        if getattr(arguments, name) not in choices:
            raise OptionError(
                f"{name} = {getattr(arguments, name)!r} in {where}",
                expected=f"one of {', '.join(map(str, choices))}",
                do="choose",
            )
    for name in COUNTS:
        count = getattr(arguments, name)
        if count is not None and (type(count) is not int or count < 1):
            raise OptionError(f"{name} = {count!r} in {where}", expected="a whole number, or null", do="correct it")
    if type(arguments.dry_run) is not bool:
        raise OptionError(f"dry_run = {arguments.dry_run!r} in {where}", expected="true or false", do="correct it")
    rate = arguments.max_bad_rate
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise OptionError(f"max_bad_rate = {rate!r} in {where}", expected="a share from 0 to 1", do="correct it")
    _check_report_to(arguments.report_to, where)
    _check_validation(arguments, where)
    _check_optimizer(OptimizerNames(arguments.optim).value, where)
    defaults = {option.name: option.default for option in fields(SftArguments)}
    for name, reason in UNSUPPORTED.items():
        if name in defaults and getattr(arguments, name) not in (defaults[name], None, "no", "random"):
            raise OptionError(
                f"{name} = {getattr(arguments, name)!r} in {where}", expected=f"no `{name}`: {reason}", do="remove it"
            )


def _check_validation(arguments: SftArguments, where: str) -> None:
    """There is something to validate on where validation is asked for, and the other way round."""
    asked = [name for name in ("eval_on_start", "eval_sample_steps") if getattr(arguments, name)]
    asked += ["eval_strategy"] if arguments.eval_strategy != "no" else []
    if asked and not arguments.eval_data:
        raise OptionError(
            f"{asked[-1]} in {where}, and no `eval_data`",
            expected="rows to validate on",
            do="add `eval_data`, written like `data`",
        )
    if arguments.eval_data and not asked:
        raise OptionError(
            f"`eval_data` in {where}, and no word about when to validate",
            expected="`eval_strategy: epoch`, or `eval_strategy: steps` with `eval_steps`",
            do="add one, or remove `eval_data`",
        )


def check_batching(arguments: SftArguments, given: Mapping[str, Any], where: str) -> None:
    """The options of packing stand together. A pack is one row, and that is then the batch size.

    Args:
        arguments: Of the run.
        given: The options that were named.
        where: They stand.

    Raises:
        OptionError: One of them would be ignored, or the size of a pack is not said.
    """
    size = arguments.per_device_train_batch_size
    if arguments.batching != "packed":
        if arguments.pack_length is not None:
            raise OptionError(
                f"pack_length = {arguments.pack_length} and batching = {arguments.batching!r} in {where}",
                expected="`pack_length` with packed batches only",
                do="set `batching: packed`, or remove `pack_length`",
            )
        return
    if given.get("per_device_train_batch_size") is not None and size != 1:
        raise OptionError(
            f"per_device_train_batch_size = {size} and batching = 'packed' in {where}",
            expected="1, or none: how many rows a pack holds is decided by their lengths",
            do="remove it, and set `pack_length` to the tokens of a micro-batch",
        )
    if arguments.pack_length is None and arguments.max_length is None:
        raise OptionError(
            f"batching = 'packed' without pack_length or max_length in {where}",
            expected="how many tokens a micro-batch has at most",
            do="set `pack_length` to as many as memory has room for",
        )
    arguments.per_device_train_batch_size = 1


def _check_report_to(services: list[str], where: str) -> None:
    """What is named is known and installed; transformers would say so when the model is loaded and a run begun."""
    for service in services:
        if service not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise OptionError(f"report_to = {service!r} in {where}", expected=f"none, or some of {known}", do="choose")
        packages = SERVICE_PACKAGES.get(service, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise OptionError(
                f"report_to = {service!r} in {where}, and {packages[0]} is not installed",
                expected=f"the package {packages[0]}",
                do="install it, or set `report_to: none`: log.jsonl is written in any case",
            )


def _check_optimizer(name: str, where: str) -> None:
    """It takes our groups of parameters, and is installed."""
    if name.startswith(("galore_", "apollo_", "lomo", "adalomo")):
        raise OptionError(
            f"optim = {name!r} in {where}",
            expected="an optimizer that takes a learning rate for each part; this one makes groups of its own",
            do="choose adamw_torch, or adamw_8bit for its smaller states",
        )
    is_of_bitsandbytes = "_torch" not in name and (
        name.endswith(("_8bit", "_bnb", "_bnb_32bit")) or name.startswith(("paged_", "lion_", "ademamix"))
    )
    if is_of_bitsandbytes and importlib.util.find_spec("bitsandbytes") is None:
        raise OptionError(
            f"optim = {name!r} in {where}, and bitsandbytes is not installed",
            expected="bitsandbytes, which runs on Linux",
            do="install this project with its extra `bnb`: pip install '.[bnb]' in the checkout",
        )


def read_parts(parts: Any) -> dict[str, PartOptions]:
    """`{"text": "lora"}` and `{"text": {"mode": "lora", "rank": 8}}` as options by part.

    Raises:
        OptionError: Another form, or an unknown key.
    """
    if not isinstance(parts, dict):
        raise OptionError(f"parts = {parts!r}", expected="a mapping of parts", do="see the example in --help")
    read = {}
    for name, value in parts.items():
        if isinstance(value, PartOptions):
            read[name] = value
            continue
        read[name] = _read_part(name, {"mode": value} if isinstance(value, str) else value)
    return read


def _read_part(name: str, given: Any) -> PartOptions:
    kinds: dict[str, type] = {
        "mode": str, "learning_rate": float, "rank": int, "alpha": float, "dropout": float, "layers": str,
        "dora": bool, "quantize": str, "checkpointing": bool,
    }  # fmt: skip
    if not isinstance(given, dict):
        raise OptionError(
            f"parts: {name} = {given!r}", expected="frozen, lora or full, or a mapping with `mode`", do="correct it"
        )
    if unknown := [key for key in given if key not in kinds]:
        raise OptionError(
            f"parts: {name}: unknown key {unknown[0]!r}", expected=f"some of {', '.join(kinds)}", do="correct it"
        )
    chosen = {}
    for key, value in given.items():
        if value is None and key in ("learning_rate", "layers", "quantize"):
            continue
        try:
            if kinds[key] is bool and not isinstance(value, bool):
                raise TypeError("true or false")
            chosen[key] = kinds[key](value)  # YAML reads 1e-3 as a word
        except (TypeError, ValueError) as error:
            raise OptionError(
                f"parts: {name}: {key} = {value!r}", expected=f"a {kinds[key].__name__}", do="correct it"
            ) from error
    if chosen.get("rank", 1) < 1 or chosen.get("learning_rate", 0.0) < 0:
        raise OptionError(
            f"parts: {name}: {given}", expected="rank at least 1, learning_rate at least 0", do="correct it"
        )
    return PartOptions(**chosen)
