"""The options of a training run: typed, read once from a YAML file and the command line, unknown keys refused."""

import argparse
import difflib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from mllm.data.examples import OVERLONG
from mllm.data.mixture_file import read_mixture
from mllm.data.sources import ON_BAD
from mllm.errors import OptionError
from mllm.models.parts import PartOptions

EXAMPLE = """
example of a --config file:

  model: runs/mine/assembled          # or a mapping: image_encoder, language_model, connector, geometry, ...
  parts:
    image.encoder: frozen
    image.connector: {mode: full, learning_rate: 1.0e-3}
    text: {mode: lora, rank: 16, alpha: 32}
  data:                               # or {mixture: FILE.yaml}, our own or LLaVA-NeXT's
    - rows.jsonl
    - {path: llava.json, media_root: images, take: "random:10%", on_bad: quarantine}
  learning_rate: 2.0e-4
  per_device_train_batch_size: 16
  num_train_epochs: 1
  output_dir: runs/mine/sft

Options of transformers' TrainingArguments may stand in the file, too, and every option on the command line.
Run it as   accelerate launch train/sft.py --config mine.yaml
"""


@dataclass
class SftArguments(TrainingArguments):
    """Options of `train/sft.py`: ours, and those of transformers' `TrainingArguments`."""

    model: Any = field(
        default=None,
        metadata={"help": "Checkpoint to start from, or a mapping with the arguments of mllm.assemble.assemble."},
    )
    parts: Any = field(
        default_factory=dict,
        metadata={
            "help": "What is trained: part (image.encoder, image.connector, text) to frozen, lora or full, or to a "
            "mapping with mode, learning_rate, rank, alpha, dropout. Parts not named are frozen."
        },
    )
    data: Any = field(
        default_factory=list,
        metadata={
            "help": "Sources: a list of paths or of mappings (path, format, media_root, take: first:N, weight, ...); "
            "a mapping with sources, temperature, epoch_rows; or {mixture: FILE.yaml}."
        },
    )
    data_root: str | None = field(
        default=None,
        metadata={"help": "What relative paths in `data` are relative to; the --config file's directory by default."},
    )
    max_length: int | None = field(
        default=2048, metadata={"help": "Longest row in tokens, placeholders included; null for no limit."}
    )
    overlong: str = field(
        default="drop", metadata={"help": "Rows longer than max_length: drop (counted and reported) or error."}
    )
    on_bad: str = field(
        default="error",
        metadata={
            "help": "Broken rows and media, where a source does not say: error (all are found before the run starts) "
            "or quarantine (left out, listed in OUTPUT_DIR/quarantine.jsonl, counted)."
        },
    )
    max_bad_rate: float = field(
        default=0.05, metadata={"help": "Share of broken rows of a source above which quarantine, too, is an error."}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the weights: auto (as saved), float32 or bfloat16. float32 with `bf16: true` is mixed "
            "precision."
        },
    )
    logging_steps: float = field(default=10.0, metadata={"help": "Steps between two lines of the log."})
    # transformers' defaults of these are ints under a float annotation, which our tests do not let pass.
    warmup_steps: float = field(default=0.0, metadata={"help": "Steps, or a share of them below 1, to warm up in."})
    eval_delay: float = field(default=0.0, metadata={"help": argparse.SUPPRESS})
    save_steps: float = field(default=500.0, metadata={"help": "Steps between two checkpoints."})

    def __post_init__(self):
        self.remove_unused_columns = False  # batches are ours, there are no columns
        self.ddp_find_unused_parameters: bool | None
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trained parameter gets a gradient, if only of zero
        super().__post_init__()


OWN = ("model", "parts", "data", "data_root", "max_length", "overlong", "on_bad", "max_bad_rate", "dtype")
CHOICES = {"overlong": OVERLONG, "on_bad": ON_BAD, "dtype": ("auto", "float32", "bfloat16")}
UNSUPPORTED = {
    "eval_strategy": "training does not evaluate; evaluate checkpoints with scripts/",
    "eval_on_start": "training does not evaluate; evaluate checkpoints with scripts/",
    "load_best_model_at_end": "training does not evaluate; evaluate checkpoints with scripts/",
    "auto_find_batch_size": "batches are planned for the whole run; set per_device_train_batch_size",
    "label_smoothing_factor": "the loss is plain cross-entropy",
    "dataloader_drop_last": "every row is used exactly once an epoch",
    "train_sampling_strategy": "rows are shuffled anew in each epoch",
    "save_only_model": "a checkpoint can always be gone on from; OUTPUT_DIR/final is the model alone",
    "ignore_data_skip": "a run goes on where it was left",
    "resume_from_checkpoint": "the same command again goes on from the newest complete checkpoint",
    "push_to_hub": "scripts/export.py uploads",
    "include_num_input_tokens_seen": "log.jsonl holds no token counts",
    "logging_dir": "log.jsonl stands in output_dir",
}
"""Options of TrainingArguments that would be ignored, or do harm, and why."""

COMMON = (
    "output_dir", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
    "max_steps", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "bf16",
    "gradient_checkpointing", "save_strategy", "save_steps", "save_total_limit", "logging_steps", "report_to",
    "dataloader_num_workers", "use_cpu",
)  # fmt: skip


def parse_arguments(argv: Sequence[str]) -> SftArguments:
    """Read `--config FILE` and the options that override it; `--help` shows ours first.

    Raises:
        OptionError: A key is unknown, or a value cannot be read.
    """
    parser = argparse.ArgumentParser(
        "train/sft.py", description="Supervised fine-tuning of a composed model.", epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", type=Path, help="YAML file with any of these options")
    parser.add_argument("--stage", help="which stage to run, where --config is a plan")
    known = {option.name: option for option in fields(SftArguments) if option.init}
    for title, names in (("options of mllm", OWN), ("often used options of TrainingArguments", COMMON)):
        group = parser.add_argument_group(title)
        for name in names:
            group.add_argument(f"--{name}", metavar="VALUE", help=_help(known[name]), default=argparse.SUPPRESS)
    rest = parser.add_argument_group("all other options of TrainingArguments, by their names")
    for name in sorted(set(known) - set(OWN) - set(COMMON)):
        rest.add_argument(f"--{name}", help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    config, stage = given.pop("config"), given.pop("stage")
    options = read_config(config, stage=stage) if config else {}
    if config and "data_root" not in given:
        options.setdefault("data_root", str(config.parent))
    options |= {name: _read_yaml(value, f"--{name}") if name in OWN else value for name, value in given.items()}
    return build_arguments(options, where=str(config) if config else "the command line")


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
    chosen = {key: value for key, value in stages[stage].items() if key != "name"}
    return {"output_dir": f"runs/{path.stem}/{stage}", **shared, **chosen}


def build_arguments(options: Mapping[str, Any], *, where: str) -> SftArguments:
    """Typed arguments from plain values.

    Raises:
        OptionError: A key is unknown (the nearest is named), required and missing, or its value cannot be read.
    """
    _check_names(options, where)
    plain = {name: value for name, value in options.items() if name not in OWN and value is not None}
    command = [item for name, value in plain.items() for item in _as_command(name, value)]
    try:
        parser = HfArgumentParser(SftArguments, exit_on_error=False, allow_abbrev=False)
        typed = vars(parser.parse_args(command))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # gradient_checkpointing, by its name in every release
            arguments = SftArguments(**{name: typed[name] for name in plain})
    except (argparse.ArgumentError, ValueError) as error:
        raise OptionError(f"{where}: {error}", expected="a value of the option's type", do="correct it") from error
    for name in OWN:
        if name in options:
            setattr(arguments, name, options[name])
    _check_values(arguments, where)
    arguments.parts = read_parts(arguments.parts)
    shared = {"on_bad": arguments.on_bad, "max_bad_rate": arguments.max_bad_rate}
    arguments.data = read_mixture(arguments.data, root=arguments.data_root, shared=shared)
    return arguments


def _check_names(options: Mapping[str, Any], where: str) -> None:
    known = [option.name for option in fields(SftArguments) if option.init]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise OptionError(
                f"unknown option {name!r} in {where}",
                expected="an option that `train/sft.py --help` lists, or one of transformers' TrainingArguments",
                do=f"write `{near[0]}`, if that was meant" if near else "remove it, or correct its name",
            )
    for name in ("model", "data", "output_dir"):
        if not options.get(name):
            raise OptionError(f"no `{name}` in {where}", expected=f"a value for `{name}`", do=f"add `{name}`")


def _check_values(arguments: SftArguments, where: str) -> None:
    """What `HfArgumentParser` does not check: our options, and those of transformers that would not be honoured."""
    for name, choices in CHOICES.items():
        if getattr(arguments, name) not in choices:
            raise OptionError(
                f"{name} = {getattr(arguments, name)!r} in {where}",
                expected=f"one of {', '.join(choices)}",
                do="choose",
            )
    length = arguments.max_length
    if length is not None and (not isinstance(length, int) or length < 1):
        raise OptionError(f"max_length = {length!r} in {where}", expected="a whole number, or null", do="correct it")
    rate = arguments.max_bad_rate
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise OptionError(f"max_bad_rate = {rate!r} in {where}", expected="a share from 0 to 1", do="correct it")
    defaults = {option.name: option.default for option in fields(SftArguments)}
    for name, reason in UNSUPPORTED.items():
        if name in defaults and getattr(arguments, name) not in (defaults[name], None, "no", "random"):
            raise OptionError(
                f"{name} = {getattr(arguments, name)!r} in {where}", expected=f"no `{name}`: {reason}", do="remove it"
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
    kinds = {"mode": str, "learning_rate": float, "rank": int, "alpha": float, "dropout": float}
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
        if key == "learning_rate" and value is None:
            continue
        try:
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
