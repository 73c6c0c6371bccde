"""The queries and keys of a layer, read without running its attention.

The layer is run on its own inputs with another attention function, under which it stops as soon as it has queries and
keys: norms, biases, rotations and whatever else a family does to them are its own, and its real attention stays the
kernel it is.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn
from transformers import AttentionInterface, Cache, PreTrainedConfig

from mllm.errors import OptionError
from mllm.shapes import Float, Tensor

_READING = "mllm_queries_and_keys"


class QueriesKeys(NamedTuple):
    """Of a layer, after rotation, a key head for each query head."""

    queries: Float[Tensor, "B H T d"]
    keys: Float[Tensor, "B H T d"]
    scaling: float


class _Found(Exception):
    """Leads queries and keys out of the layer."""

    def __init__(self, found: QueriesKeys):
        self.found = found


@torch.no_grad()
def queries_and_keys(layer: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> QueriesKeys:
    """What a layer makes of its inputs, as far as scores need it.

    Args:
        layer: Of a decoder or an encoder; its attention goes through transformers' attention functions.
        args: Its inputs.
        kwargs: By name; a cache among them is not touched.

    Raises:
        OptionError: Its attention is computed in some other way.
    """
    AttentionInterface.register(_READING, _stop_at_scores)  # again and again: nothing happens at import
    without_cache = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    without_cache |= {name: False for name in ("use_cache",) if name in kwargs}
    try:
        with _reading(layer):
            layer(*args, **without_cache)
    except _Found as read:
        return read.found
    raise OptionError(
        f"a {type(layer).__name__} whose attention is not one of transformers' attention functions",
        expected="a layer whose queries and keys can be read",
        do="choose a pruner that needs no attention scores: uniform, random, divprune",
    )


def _stop_at_scores(
    module: nn.Module,
    query: Float[Tensor, "B H T d"],
    key: Float[Tensor, "B K T d"],
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> NoReturn:
    groups = query.shape[1] // key.shape[1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    raise _Found(QueriesKeys(query, key.repeat_interleave(groups, dim=1), scaling))


@contextmanager
def _reading(layer: nn.Module) -> Iterator[None]:
    configs = {id(one): one for one in map(_config_of, layer.modules()) if one is not None}.values()
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = _READING
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def _config_of(module: nn.Module) -> PreTrainedConfig | None:
    config = vars(module).get("config")
    return config if isinstance(config, PreTrainedConfig) else None
