"""The options of a training run: typed, read once from a YAML file and the command line, unknown keys refused."""

import argparse
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from mllm.data.rows import RowSource
from mllm.errors import OptionError
from mllm.models.parts import PartOptions

EXAMPLE = """
example of a --config file:

  model: runs/mine/assembled          # or a mapping: image_encoder, language_model, connector, geometry, ...
  parts:
    image.encoder: frozen
    image.connector: {mode: full, learning_rate: 1.0e-3}
    text: {mode: lora, rank: 16, alpha: 32}
  data:
    - path: rows.jsonl
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
            "help": "What is trained: part (image.encoder, image.connector, text) to frozen, lora or full, or to a mapping "
            "with mode, learning_rate, rank, alpha, dropout. Parts not named are frozen."
        },
    )
    data: Any = field(
        default_factory=list,
        metadata={"help": "Row files: a list of paths, or of mappings with path and first (only that many rows)."},
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
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})

    def __post_init__(self):
        self.remove_unused_columns = False  # batches are ours, there are no columns
        super().__post_init__()


OWN = ("model", "parts", "data", "data_root", "max_length", "overlong")
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
    options |= {name: yaml.safe_load(value) if name in OWN else value for name, value in given.items()}
    return build_arguments(options, where=str(config) if config else "the command line")


def read_config(path: Path, *, stage: str | None = None) -> dict[str, Any]:
    """The options in a YAML file; of a plan, those of one stage, with the plan's model.

    Raises:
        OptionError: No such file, no mapping in it, or a plan without a choice of stage.
    """
    if not path.is_file():
        raise OptionError(f"--config {path} is not there", expected="a YAML file", do="correct the path")
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(options, dict):
        raise OptionError(
            f"--config {path} holds {type(options).__name__}", expected="a mapping", do="write key: value"
        )
    if "stages" not in options:
        return options
    stages = {entry["name"]: entry for entry in options["stages"]}
    if stage is None and len(stages) == 1:
        stage = next(iter(stages))
    if stage not in stages:
        raise OptionError(
            f"--config {path} is a plan, and --stage is {stage!r}",
            expected=f"one of {', '.join(stages)}",
            do="name it with --stage, or run the whole plan with train/run.py",
        )
    chosen = {key: value for key, value in stages[stage].items() if key != "name"}
    return {"model": options["model"], "output_dir": f"runs/{path.stem}/{stage}", **chosen}


def build_arguments(options: Mapping[str, Any], *, where: str) -> SftArguments:
    """Typed arguments from plain values.

    Raises:
        OptionError: A key is unknown (the nearest is named), required and missing, or its value cannot be read.
    """
    known = [option.name for option in fields(SftArguments) if option.init]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise OptionError(
                f"unknown option {name!r} in {where}",
                expected="an option that `train/sft.py --help` lists, or one of transformers' TrainingArguments",
                do=f"write `{near[0]}`, if that was meant" if near else "remove it, or correct its name",
            )
    for name in ("model", "data", "output_dir"):
        if not options.get(name):
            raise OptionError(f"no `{name}` in {where}", expected=f"a value for `{name}`", do=f"add `{name}`")
    plain = {name: value for name, value in options.items() if name not in OWN and value is not None}
    command = [item for name, value in plain.items() for item in (f"--{name}", _as_text(value))]
    try:
        parser = HfArgumentParser(SftArguments, exit_on_error=False, allow_abbrev=False)
        (arguments,) = parser.parse_args_into_dataclasses(command, look_for_args_file=False)
    except (argparse.ArgumentError, ValueError) as error:
        raise OptionError(f"{where}: {error}", expected="a value of the option's type", do="correct it") from error
    for name in OWN:
        if name in options:
            setattr(arguments, name, options[name])
    arguments.parts = read_parts(arguments.parts)
    arguments.data = read_sources(arguments.data, root=arguments.data_root)
    return arguments


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
        chosen = {"mode": value} if isinstance(value, str) else dict(value)
        known = [option.name for option in fields(PartOptions)]
        unknown = [key for key in chosen if key not in known]
        if unknown:
            raise OptionError(
                f"parts: {name}: unknown key {unknown[0]!r}", expected=f"some of {', '.join(known)}", do="correct it"
            )
        if "learning_rate" in chosen and chosen["learning_rate"] is not None:
            chosen["learning_rate"] = float(chosen["learning_rate"])  # YAML reads 1e-3 as a word
        read[name] = PartOptions(**chosen)
    return read


def read_sources(data: Any, *, root: str | None) -> list[RowSource]:
    """`["a.jsonl", {"path": "b.jsonl", "first": 100}]` as row sources, relative paths under `root`.

    Raises:
        OptionError: Another form, or an unknown key.
    """
    if not isinstance(data, list):
        raise OptionError(f"data = {data!r:.80}", expected="a list of row files", do="see the example in --help")
    sources = []
    for entry in data:
        if isinstance(entry, RowSource):
            sources.append(entry)
            continue
        entry = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or "path" not in entry or set(entry) - {"path", "first"}:
            raise OptionError(f"data: {entry!r:.80}", expected="a mapping with path, and first", do="correct it")
        sources.append(RowSource(Path(root or ".", entry["path"]), first=entry.get("first")))
    return sources


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def _help(option) -> str:
    text = str(option.metadata.get("help", "")).split("\n")[0].replace("%", "%%")
    default = option.default if option.default is not MISSING else None
    return text if default in (None, "") else f"{text} Default: {default}".replace("%", "%%").replace("%%%%", "%%")
