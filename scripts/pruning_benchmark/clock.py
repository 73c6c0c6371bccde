"""When tokens come, and how long a pruner takes to decide."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from transformers import StoppingCriteria

import mllm.pruning.forward
from mllm.pruning import Pruner
from mllm.shapes import Tensor

DECIDING = ("select", "select_at_cut")
"""What a pruner is asked by."""
READING = ("queries_and_keys", "match_tokens")
"""Functions that read what decisions are made by, and that decide inside of an encoder."""
MOVING = ("enter", "before_layer", "leave")
"""What hands the tokens that are left from layer to layer, and asks the pruner on the way."""


def now() -> float:
    """Seconds, when everything asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class TokenClock(StoppingCriteria):
    """Notes when each new token is known. It stops nothing."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: Any) -> Tensor:
        """Called by `generate` behind each new token."""
        self.times.append(now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Stopwatch:
    """Adds up the time of calls; calls inside of calls are not counted twice."""

    def __init__(self):
        self.seconds = 0.0
        self._is_running = False

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time taken."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._is_running:
                return function(*args, **kwargs)
            self._is_running, start = True, now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += now() - start
                self._is_running = False

        return call


@contextmanager
def timing_decisions(pruner: Pruner | None) -> Iterator[tuple[Stopwatch, Stopwatch]]:
    """Take the time that deciding takes, and that all of the pruner's work around the model's own takes.

    Enter it before the pruner. Deciding is asking the pruner, and reading queries and keys for it.
    """
    decisions, work = Stopwatch(), Stopwatch()
    with ExitStack() as stack:
        if pruner is not None:
            for name in DECIDING:
                own = work.timed(decisions.timed(getattr(pruner, name)))
                stack.enter_context(patch.object(pruner, name, own))
            modules = [one for name, one in sys.modules.items() if name.startswith("mllm.pruning")]
            for module, name in product(modules, READING):
                if name in vars(module):
                    own = work.timed(decisions.timed(vars(module)[name]))
                    stack.enter_context(patch.object(module, name, own))
            forward = mllm.pruning.forward.Forward
            for name in MOVING:
                stack.enter_context(patch.object(forward, name, work.timed(vars(forward)[name])))
        yield decisions, work
