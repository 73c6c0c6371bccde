"""Encoders as a fill calls them: in eval mode, whole, on their device, and without asking other ranks."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from mllm.models.modeling import MllmTower
from mllm.shapes import EncoderFeatures, MediaValues, Tensor
from mllm.training.feature_cache.fill import Encode


def encoder_of(tower: MllmTower, *, device: torch.device | str, autocast: torch.dtype | None) -> Encode:
    """From views to what the connector would get in training."""
    device, encoder = torch.device(device), tower.encoder
    assert encoder is not None
    encoder.eval()
    if not is_sharded(encoder):
        encoder.to(device)

    def encode(values: MediaValues, sizes: Tensor | None) -> EncoderFeatures:
        with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            return tower.encode(values.to(device), sizes)

    return encode


@contextmanager
def ready(tower: MllmTower) -> Iterator[None]:
    """Have an encoder at hand that ZeRO-3 may have dealt out among the ranks, to be called by each as often as needed.

    All ranks enter and leave together.
    """
    chunk, tower.encoder_chunk = tower.encoder_chunk, None
    try:
        with _whole(tower.encoder):
            yield
    finally:
        tower.encoder_chunk = chunk


def is_sharded(module: nn.Module) -> bool:
    """Whether ZeRO-3 has dealt out the weights of a module."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def _whole(module: nn.Module) -> Any:
    if not is_sharded(module):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(module.parameters()))
