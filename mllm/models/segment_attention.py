"""Attention for packed rows: every segment sees itself alone.

A packed row holds several conversations one behind the other. `isolate_segments` gives a model's language model an
attention named "sdpa_segments", registered with transformers. Where a forward is told `segment_lengths`, it attends
within each segment; where it is not (padded batches, generation), it is transformers' own SDPA, padding mask and all.

On CUDA one kernel takes all segments by their cumulative lengths. Elsewhere SDPA runs once for each segment: as fast
as segments of like length in one call, and many times faster than one call with a dense block mask, which computes
every pair of tokens of the row.
"""

import inspect
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from mllm.errors import OptionError
from mllm.models.isolation import check_segments_possible, impossible, try_isolation
from mllm.shapes import Float, Int, Tensor

SEGMENTS = "sdpa_segments"
_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
_KERNEL_WIDTH = 256
"""The widest head that the kernels take; they want a multiple of 8."""


def isolate_segments(model: PreTrainedModel, *, longest: int) -> None:
    """Make the language model of `model` keep the segments of packed rows apart; its encoders stay as they are.

    Args:
        model: Composed here, or of a stock class.
        longest: Tokens of the longest segment that will come.

    Raises:
        OptionError: Its language model mixes tokens in a way that cannot be kept within segments.
    """
    check_segments_possible(model.config, longest=longest)
    AttentionInterface.register(SEGMENTS, segment_attention)
    AttentionMaskInterface.register(SEGMENTS, segment_mask)
    text = model.config.get_text_config()
    name = next((name for name in model.config.sub_configs if getattr(model.config, name) is text), None)
    try:
        model.set_attn_implementation(SEGMENTS if name is None else {name: SEGMENTS})
    except ValueError as error:
        raise impossible(text, "transformers has no SDPA for it") from error
    try_isolation(model)


def segment_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B K U D"],
    value: Float[Tensor, "B K U E"],
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B T H E"], None]:
    """Causal attention within each segment, under the signature of transformers' attention functions.

    Args:
        module: The layer.
        query: Of all tokens.
        key: Of all tokens; fewer heads than `query` where these share them.
        value: As `key`.
        attention_mask: Of `segment_mask`; for packed rows its mark.
        dropout: Of the attention weights.
        scaling: Of the scores; 1 / sqrt(D) where absent.
        segment_lengths: Tokens of each segment, in order; None for a batch that is not packed.
        **kwargs: What else the family tells an attention function.

    Raises:
        OptionError: Positions say that the row is packed, but there are no lengths, or they are others.
    """
    is_marked = attention_mask is not None and attention_mask.numel() == 0
    lengths = tuple(segment_lengths or ())
    if is_marked != (len(lengths) > 1):
        raise _disagreement(
            f"positions that make {'several segments' if is_marked else 'one'}, lengths of {len(lengths)}"
        )
    if not is_marked:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if query.shape[0] != 1 or not sum(lengths) == query.shape[2] == key.shape[2]:
        raise _disagreement(f"segments of {sum(lengths)} tokens together, {query.shape[0]} rows of {query.shape[2]}")
    if kwargs.get("softcap") is not None:
        raise _disagreement("attention scores with a soft cap, which SDPA does not know")
    if _has_kernel(query, value, dropout):
        return _by_kernel(query, key, value, lengths, dropout=dropout, scaling=scaling), None
    shares_keys, outputs = query.shape[1] != key.shape[1], []
    for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):
        output = scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=shares_keys
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def segment_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask that transformers asks for, except for packed rows: these get an empty one, a mark, in place of [T, T].

    transformers sees by the positions that a row is packed, and allows no skipping then. Without this function it
    would not ask for a mask at all, and padding would be attended to.
    """
    if attention_mask is None and not allow_is_causal_skip and not use_vmap and q_length == kv_length:
        return torch.empty(batch_size, 1, 0, 0, dtype=torch.bool, device=device)
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )


def _has_kernel(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether a kernel for segments of any length takes these tensors."""
    width = query.shape[-1]
    fits = query.is_cuda and width == value.shape[-1] and width <= _KERNEL_WIDTH and width % 8 == 0
    if not fits or _compute_dtype(query) not in _KERNEL_DTYPES:
        return False
    return is_flash_attn_2_available() or (dropout == 0.0 and _has_varlen_attn())


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], *, dropout: float, scaling: float | None
) -> Float[Tensor, "1 T H D"]:
    bounds, longest = _bounds(lengths, query.device), max(lengths)
    dtype = _compute_dtype(query)
    flat = [tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value)]
    if is_flash_attn_2_available():
        from flash_attn import flash_attn_varlen_func

        output = flash_attn_varlen_func(
            *flat, bounds, bounds, longest, longest, dropout_p=dropout, softmax_scale=scaling, causal=True
        )
    else:
        from torch.nn.attention.varlen import varlen_attn

        shares_keys = query.shape[1] != key.shape[1]
        output = varlen_attn(
            *flat, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=shares_keys
        )
    return output[None]


def _compute_dtype(query: Tensor) -> torch.dtype:
    """SDPA follows autocast by itself; the kernels have to be told."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


@lru_cache
def _has_varlen_attn() -> bool:
    """Whether this torch has it, in a form with our arguments."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


@lru_cache(maxsize=16)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Int[Tensor, " S"]:
    """Where segments begin and end, once for all layers of a batch."""
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return bounds.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else bounds.to(device)


def _disagreement(found: str) -> OptionError:
    return OptionError(
        found,
        expected="a packed batch of one row, with position_ids from 0 in every segment and its segment_lengths",
        do="make batches with mllm.data.collate.PackingCollator, or set `batching: length`",
    )
