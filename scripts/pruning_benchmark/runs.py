"""One answer of a model under a pruner, or under none: how long it takes, what arithmetic it is, what it holds."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel, StoppingCriteriaList

from mllm.pruning import Pruner, Uniform
from mllm.pruning.anatomy import anatomy_of
from mllm.shapes import Tensor
from pruning_benchmark.arithmetic import counting
from pruning_benchmark.clock import TokenClock, now, timing_decisions
from training_benchmark.process import memory_mib, start_counting_memory


def time_answer(
    model: PreTrainedModel, inputs: dict[str, Tensor], pruner: Pruner | None, *, new_tokens: int
) -> dict[str, float]:
    """Seconds from pixel values to each token of an answer, and the peak of memory on the way.

    `ttft` ends when the first token's id is known; `prefill` is the part of it that begins in front of the language
    model's first layer.
    """
    clock, entries = TokenClock(), []
    _settle()
    before = _memory_before()
    with entered(pruner, model), noting_entries(model, lambda: entries.append(now())):
        start = now()
        _generate(model, inputs, new_tokens=new_tokens, clock=clock)
    end = clock.times[-1]
    first = clock.times[0]
    return {
        "ttft": first - start,
        "prefill": first - entries[0],
        "end_to_end": end - start,
        "decode": (end - first) / max(len(clock.times) - 1, 1),
        "peak_mib": _peak_mib() - before,
    }


def time_decisions(model: PreTrainedModel, inputs: dict[str, Tensor], pruner: Pruner) -> dict[str, float]:
    """Seconds of a prompt that go into deciding, and into all that a pruner does."""
    with timing_decisions(pruner) as (decisions, work), entered(pruner, model):
        _generate(model, inputs, new_tokens=1)
    return {"deciding": decisions.seconds, "pruner_work": work.seconds}


def count_prompt(model: PreTrainedModel, inputs: dict[str, Tensor], pruner: Pruner | None) -> dict[str, Any]:
    """The arithmetic of a prompt, of all and of the language model alone; and what its cache holds afterwards."""
    before_text: list[tuple[int, int]] = []
    with entered(pruner, model), counting() as counted:
        with noting_entries(model, lambda: before_text.append((counted.total, counted.done))):
            outputs = _generate(model, inputs, new_tokens=1)
        total, done = counted.total, counted.done
    rows = len(inputs["input_ids"])
    return {
        "flops": total / rows,
        "flops_done": done / rows,
        "text_flops": (total - before_text[0][0]) / rows,
        "text_flops_done": (done - before_text[0][1]) / rows,
        "cache_bytes": cache_bytes(outputs.past_key_values) / rows,
        "tokens_per_layer": _tokens_per_layer(pruner, inputs, model),
    }


def lengths_of_rows(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[tuple[list[int], int]]:
    """Of each row the lengths of its pictures, and how many other tokens it has: found by running it."""
    pruner = Uniform(tokens=1)
    with entered(pruner, model):
        _generate(model, inputs, new_tokens=1)
    visual = [[item.num_tokens for item in items] for items in pruner.statistics.items]
    totals = inputs["attention_mask"].sum(dim=1).tolist()
    return [(items, total - sum(items)) for items, total in zip(visual, totals, strict=True)]


def cache_bytes(cache: Cache) -> int:
    """What keys and values of all layers take."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def entered(pruner: Pruner | None, model: PreTrainedModel) -> AbstractContextManager:
    """The pruner's context; one that does nothing without a pruner."""
    return nullcontext() if pruner is None else pruner(model)


@contextmanager
def noting_entries(model: PreTrainedModel, note: Any) -> Iterator[None]:
    """Call `note` whenever the language model is called, before any pruner does its work there."""
    body = anatomy_of(model).body
    handle = body.register_forward_pre_hook(lambda *_: note() and None, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def _generate(
    model: PreTrainedModel, inputs: dict[str, Tensor], *, new_tokens: int, clock: TokenClock | None = None
) -> Any:
    config = GenerationConfig.from_dict(model.generation_config.to_dict())
    config.do_sample, config.max_length = False, None
    config.max_new_tokens = config.min_new_tokens = new_tokens
    config.return_dict_in_generate = True
    stopping = StoppingCriteriaList([] if clock is None else [clock])
    return model.generate(**inputs, generation_config=config, stopping_criteria=stopping)


def _tokens_per_layer(pruner: Pruner | None, inputs: dict[str, Tensor], model: PreTrainedModel) -> list[int]:
    """Of the first row, text and visual."""
    if pruner is None:
        return [int(inputs["attention_mask"][0].sum())] * len(anatomy_of(model).layers)
    return [of_rows[0] for of_rows in pruner.statistics.tokens_per_layer]


def _settle() -> None:
    """Give back what earlier runs have left, so that the peak is this run's."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # glibc keeps freed memory
        ctypes.CDLL(None).malloc_trim(0)


def _memory_before() -> float:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    return start_counting_memory()


def _peak_mib() -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else memory_mib("VmHWM")
