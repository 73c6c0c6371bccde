"""Encoders out of checkpoints: which layers are kept, and that no weight is missing and none left over."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from mllm.errors import CompositionError


def load_part(
    kind: Any,
    path: str,
    *,
    config: PreTrainedConfig,
    unexpected_prefixes: tuple[str, ...] = (),
    key_mapping: Mapping[str, str] | None = None,
) -> PreTrainedModel:
    """Load an encoder out of a checkpoint that may hold more.

    Args:
        kind: The class, or an auto class.
        path: Directory or Hub id.
        config: Of the encoder, with as many layers as are kept.
        unexpected_prefixes: Keys that are not the encoder's and may be left behind.
        key_mapping: Patterns of the checkpoint's names and what they are in the encoder.

    Raises:
        CompositionError: Keys are missing or left over.
    """
    with _without_load_report():
        encoder, loaded = kind.from_pretrained(
            path, config=config, key_mapping=key_mapping and dict(key_mapping), output_loading_info=True
        )
    _check_keys(loaded, path, config, unexpected_prefixes)
    return encoder


def layers_needed(num_layers: int, feature_layer: int, path: str) -> int:
    """How many layers lead to these hidden states, of which there are num_layers + 1: the first are the embeddings.

    Raises:
        CompositionError: There is no such layer.
    """
    index = feature_layer if feature_layer >= 0 else num_layers + 1 + feature_layer
    if not 1 <= index <= num_layers:
        raise CompositionError(
            f"feature_layer = {feature_layer}, and {path} has {num_layers} layers",
            expected=f"-{num_layers} to -1, or 1 to {num_layers}",
            do="set `feature_layer` to one of them; -2 is LLaVA-1.5's, -1 the last layer",
        )
    return index


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Transformers would warn of every layer we leave behind on purpose; `_check_keys` judges in its place."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_keys(loaded: dict, path: str, config: PreTrainedConfig, unexpected_prefixes: tuple[str, ...]) -> None:
    """No missing key; unexpected ones only under the stated prefixes or of layers above the features."""
    missing = sorted(loaded["missing_keys"])
    mismatched = sorted(str(key) for key in loaded["mismatched_keys"])
    left_over = sorted(
        key
        for key in loaded["unexpected_keys"]
        if not key.startswith(unexpected_prefixes) and not _is_of_dropped_layer(key, config.num_hidden_layers)
    )
    if missing or mismatched or left_over:
        raise CompositionError(
            f"loading {path} left keys missing {missing[:3]}, left over {left_over[:3]}, "
            f"of other shape {mismatched[:3]}",
            expected=f"the weights of a {config.model_type!r} encoder, no more and no less",
            do="check that the checkpoint is whole and was saved by transformers",
        )


def _is_of_dropped_layer(key: str, num_layers: int) -> bool:
    """Whether `key` names a block (the first number in it) at or above the ones we keep."""
    number = next((int(piece) for piece in key.split(".") if piece.isdigit()), None)
    return number is not None and number >= num_layers
