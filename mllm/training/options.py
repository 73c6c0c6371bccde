"""The options of a training run, each with its help text: ours, and those of transformers' `TrainingArguments`."""

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from mllm.data.examples import OVERLONG
from mllm.data.sources import ON_BAD

BATCHING = ("random", "length", "packed")
"""How rows become micro-batches."""

EXAMPLE = """
example of a --config file, for a model that is composed here:

  model: runs/mine/assembled          # or a mapping: language_model, image: {encoder, connector, ...}, ...
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

what changes for a stock model (LLaVA, Qwen-VL, InternVL, ..., see docs/training.md):

  model: llava-hf/llava-1.5-7b-hf     # a Hub id or a directory
  parts: {text: {mode: lora, rank: 64, alpha: 128, quantize: 4bit}}

what changes for packed micro-batches, without any padding:

  batching: packed                    # instead of random, or length: rows of like length together
  max_length: 2048                    # longer rows are dropped, and counted
  pack_length: 8192                   # tokens of a micro-batch; per_device_train_batch_size stays unset

Options of transformers' TrainingArguments may stand in the file, too, and every option on the command line.
See what a run would do, without starting it:   python train/sft.py --config mine.yaml --dry_run
Run it:                                         accelerate launch train/sft.py --config mine.yaml
"""


@dataclass
class SftArguments(TrainingArguments):
    """Options of `train/sft.py`: ours, and those of transformers' `TrainingArguments`."""

    program: ClassVar[str] = "train/sft.py"
    about: ClassVar[str] = "Supervised fine-tuning of a composed model, or of a stock one."
    example: ClassVar[str] = EXAMPLE

    model: Any = field(
        default=None,
        metadata={"help": "Checkpoint to start from, or a mapping with the arguments of mllm.assemble.assemble."},
    )
    parts: Any = field(
        default_factory=dict,
        metadata={
            "help": "What is trained: part (image.encoder, image.connector, audio.encoder, audio.connector, "
            "video.connector, text) to frozen, lora or full, or to a mapping with mode, learning_rate, rank, alpha, "
            "dropout, dora, layers ('12:', '0:4', 'last:6'), quantize (4bit), checkpointing. Parts not named are "
            "frozen."
        },
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "For a stock checkpoint whose own template does not say what is learned: a name (llava, qwen2_vl, "
            "...; the error lists them), or a .jinja file with {% generation %} blocks."
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
    batching: str = field(
        default="random",
        metadata={
            "help": "Which rows share a micro-batch: random ones; those of like length, for little padding; or "
            "packed, one behind the other up to pack_length, without padding and without seeing each other."
        },
    )
    pack_length: int | None = field(
        default=None, metadata={"help": "Tokens of a packed micro-batch; max_length by default."}
    )
    encoder_chunk: int | None = field(
        default=None,
        metadata={"help": "Media items that an encoder reads in one call, to save memory; null for all at once."},
    )
    feature_cache: str | None = field(
        default=None,
        metadata={
            "help": "Directory in which the outputs of frozen encoders are kept, so that no later epoch, stage or run "
            "computes them again; relative to output_dir; null for none."
        },
    )
    pruner: Any = field(
        default=None,
        metadata={
            "help": "Train with fewer visual tokens: a mapping with method, its options, and tokens, of which a list "
            "[0.3, 1.0] gives each step a share of its own."
        },
    )
    cross_tokens: Any = field(
        default=None,
        metadata={
            "help": "Train under CrossGET, with fewer visual tokens and cross tokens that are learned: a mapping with "
            "r or tokens, importance, proportional, positions, weight (of the alignment loss), kl."
        },
    )
    eval_data: Any = field(
        default=None, metadata={"help": "Sources to validate on, written like `data`; the loss is given by source."}
    )
    eval_sample_steps: int | None = field(
        default=None,
        metadata={"help": "Steps between two validation rows that the model answers for the log; null for none."},
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Check everything, show what the run would do (also in OUTPUT_DIR/preflight.json), and end before "
            "the first step."
        },
    )
    logging_steps: float = field(default=10.0, metadata={"help": "Steps between two lines of the log."})
    # transformers' defaults of these are ints under a float annotation, which our tests do not let pass.
    warmup_steps: float = field(default=0.0, metadata={"help": "Steps, or a share of them below 1, to warm up in."})
    # A loss that is no number stops the run; here it would be kept out of the log, at the price of waiting for it.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": argparse.SUPPRESS})
    eval_delay: float = field(default=0.0, metadata={"help": argparse.SUPPRESS})
    save_steps: float = field(default=500.0, metadata={"help": "Steps between two checkpoints."})

    @classmethod
    def own(cls) -> tuple[str, ...]:
        """The names of our options."""
        return OWN

    @classmethod
    def choices(cls) -> dict[str, tuple[str, ...]]:
        """What our options that are words can be."""
        return CHOICES

    def check(self, where: str) -> None:
        """Check what a program's own options say together, where they stand; for programs that have some."""

    def __post_init__(self):
        self.remove_unused_columns = False  # batches are ours, there are no columns
        self.ddp_find_unused_parameters: bool | None
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trained parameter gets a gradient, if only of zero
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON can hold them, which the services of `report_to` are told."""
        options = super().to_dict()
        own = {name: options[name] for name in self.own()}
        return options | json.loads(json.dumps(own, default=_plain))


OWN = (
    "model", "parts", "chat_template", "data", "data_root", "max_length", "overlong", "on_bad", "max_bad_rate",
    "dtype", "batching", "pack_length", "encoder_chunk", "feature_cache", "pruner", "cross_tokens",
    "eval_data", "eval_sample_steps", "dry_run",
)  # fmt: skip
CHOICES = {
    "overlong": OVERLONG, "on_bad": ON_BAD, "dtype": ("auto", "float32", "bfloat16"), "batching": BATCHING,
}  # fmt: skip
COUNTS = ("max_length", "pack_length", "encoder_chunk", "eval_sample_steps")
"""Options that are a whole number from 1, or null."""

SERVICE_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}
"""What `report_to` needs one of, by service."""

UNSUPPORTED = {
    "load_best_model_at_end": "all checkpoints stay as they are; choose one by eval/loss in log.jsonl",
    "auto_find_batch_size": "batches are planned for the whole run; set per_device_train_batch_size",
    "label_smoothing_factor": "the loss is plain cross-entropy",
    "dataloader_drop_last": "every row is used exactly once an epoch",
    "train_sampling_strategy": "rows are shuffled anew in each epoch",
    "save_only_model": "a checkpoint can always be gone on from; OUTPUT_DIR/final is the model alone",
    "ignore_data_skip": "a run goes on where it was left",
    "resume_from_checkpoint": "the same command again goes on from the newest complete checkpoint",
    "push_to_hub": "scripts/export.py uploads",
    "include_num_input_tokens_seen": "log.jsonl holds tokens_per_second",
    "logging_dir": "log.jsonl stands in output_dir",
}
"""Options of TrainingArguments that would be ignored, or do harm, and why."""

COMMON = (
    "output_dir", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
    "max_steps", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "bf16",
    "gradient_checkpointing", "eval_strategy", "eval_steps", "per_device_eval_batch_size", "save_strategy",
    "save_steps", "save_total_limit", "logging_steps", "report_to", "dataloader_num_workers", "use_cpu",
)  # fmt: skip


def _plain(value: Any) -> Any:
    is_options = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_options else str(value)
