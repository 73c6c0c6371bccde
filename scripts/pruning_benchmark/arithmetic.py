"""The arithmetic of a forward as it runs, counted by `torch.utils.flop_counter`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm.shapes import Tensor

aten = torch.ops.aten
CAUSAL_AT = {
    aten._scaled_dot_product_flash_attention_for_cpu: 4,  # which torch's counter leaves out
    aten._scaled_dot_product_flash_attention: 4,
    aten._scaled_dot_product_efficient_attention: 6,
    aten._scaled_dot_product_cudnn_attention: 6,
}
"""Attention kernels that skip what a causal mask takes away, and which of their arguments says that it is causal."""


class Counted:
    """What was counted so far."""

    def __init__(self):
        self.counter = FlopCounterMode(display=False)
        self.num_skipped = 0
        for kernel, place in CAUSAL_AT.items():
            self.counter.flop_registry[kernel] = self._attention(place)

    @property
    def total(self) -> int:
        """With attention counted over all pairs of tokens, as the papers do."""
        return self.counter.get_total_flops()

    @property
    def done(self) -> int:
        """Without the half that kernels skip where attention is causal."""
        return self.total - self.num_skipped

    def _attention(self, causal_at: int) -> Callable[..., int]:
        def flops_of_call(query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any, **kwargs: Any) -> int:
            flops = attention_flops(query.shape, key.shape, value.shape)
            place = causal_at - 3
            if args[place] if len(args) > place else kwargs.get("is_causal", False):
                self.num_skipped += flops // 2
            return flops

        return flops_of_call


@contextmanager
def counting() -> Iterator[Counted]:
    """A context in which arithmetic is counted."""
    counted = Counted()
    with counted.counter:
        yield counted


def attention_flops(queries: torch.Size, keys: torch.Size, values: torch.Size) -> int:
    """Scores of all pairs, and sums of values."""
    num_rows, num_heads, num_queries, width = queries
    return 2 * num_rows * num_heads * num_queries * keys[2] * (width + values[3])
