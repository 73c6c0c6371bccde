"""Whether two models are of one architecture, told by their configurations."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from mllm.errors import OptionError

SILENT = {
    "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "label2id",
    "name_or_path", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "quantization_config",
    "return_dict", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
"""Fields that do not decide what a model makes of its inputs; those of dropout and private ones do not, either."""


def check_architecture(path: Path, reference: PreTrainedConfig, model: PreTrainedConfig) -> None:
    """Check that a reference reads what the model reads, and as it does.

    Raises:
        OptionError: It is of another architecture.
    """
    if difference := first_difference(reference, model):
        raise OptionError(
            f"reference = {str(path)!r} is of another architecture than the model: {difference}",
            expected="a checkpoint of the same model, trained otherwise",
            do="name the checkpoint that the run starts from, or remove `reference`",
        )


def first_difference(one: PreTrainedConfig, other: PreTrainedConfig) -> str | None:
    """Where two configurations describe different models.

    Returns:
        Such as "text_config.num_hidden_layers = 2, not 4"; None where they describe the same.
    """
    fields, others = dict(_fields(one.to_dict())), dict(_fields(other.to_dict()))
    for name in sorted(fields.keys() | others.keys()):
        if fields.get(name) != others.get(name):
            return f"{name} = {fields.get(name)!r}, not {others.get(name)!r}"
    return None


def _fields(config: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        name = str(name)  # some tables have numbers, which a file has as words
        if name in SILENT or name.startswith("_") or "drop" in name:
            continue
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value
