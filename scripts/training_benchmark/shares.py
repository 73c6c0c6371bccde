"""Where a step's time goes, measured from outside: hooks on modules, and clocks around the trainer's own calls."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import Trainer

ENCODERS = ("vision_tower", "image_tower.encoder")
CONNECTORS = ("multi_modal_projector", "image_tower.connector")


def time_parts(
    trainer: Trainer, media: Mapping[str, Sequence[tuple[Any, str]]]
) -> Callable[[float], dict[str, float]]:
    """Put clocks on a trainer, before it trains without workers; returns what turns all seconds into shares.

    The shares: `decode` (a file's bytes to pixels), `preprocess` (pixels to what the encoder reads), `collate` (the
    rest of what makes a batch), `encoder`, `connector`, `llm` (forward, and backward with the connector's), `head`
    (forward and backward of head, loss and its metrics), `optimizer`, `other`. The clocks cost a few microseconds a
    call; on a GPU they wait for it, so that there a run with them is slower than one without.

    Args:
        trainer: Of either side.
        media: Owners and names of the functions that this side decodes ("decode") and prepares ("preprocess") with.
    """
    clock: dict[str, float] = defaultdict(float)
    trainer.get_batch_samples = timed(trainer.get_batch_samples, clock, "batch")
    trainer.compute_loss = timed(trainer.compute_loss, clock, "forward")
    for name, functions in media.items():
        for owner, function in functions:
            setattr(owner, function, timed(getattr(owner, function), clock, name))
    modules = dict(trainer.model.named_modules())
    _time_module(_find(modules, ENCODERS), clock, "encoder")
    _time_module(_find(modules, CONNECTORS), clock, "connector")
    language_model = _find(modules, ("language_model",))
    _time_module(language_model, clock, "llm")
    _split_backward(trainer, language_model, clock)
    register_optimizer_step_pre_hook(lambda *_: clock.__setitem__("step_start", now()))
    register_optimizer_step_post_hook(lambda *_: _add(clock, "optimizer", now() - clock["step_start"]))

    def shares(seconds: float) -> dict[str, float]:
        found = {
            "decode": clock["decode"],
            "preprocess": clock["preprocess"],
            "collate": clock["batch"] - clock["decode"] - clock["preprocess"],
            "encoder": clock["encoder"],
            "connector": clock["connector"],
            "llm": clock["llm"] + clock["backward"] - clock["head_backward"],
            "head": clock["forward"] - clock["encoder"] - clock["connector"] - clock["llm"] + clock["head_backward"],
            "optimizer": clock["optimizer"],
        }
        found["other"] = seconds - sum(found.values())
        return {name: round(value / seconds, 4) for name, value in found.items()}

    return shares


def timed(function: Callable[..., Any], clock: dict[str, float], name: str) -> Callable[..., Any]:
    """The function, with the seconds of its calls added up; a call inside another of the same name is part of it."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if clock[f"{name} runs"]:
            return function(*args, **kwargs)
        clock[f"{name} runs"], start = 1.0, now()
        try:
            return function(*args, **kwargs)
        finally:
            clock[name] += now() - start
            clock[f"{name} runs"] = 0.0

    return call


def now() -> float:
    """A clock that has waited for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _find(modules: dict[str, nn.Module], names: tuple[str, ...]) -> nn.Module:
    return next(module for full, module in modules.items() if full.endswith(names))


def _time_module(module: nn.Module, clock: dict[str, float], name: str) -> None:
    module.register_forward_pre_hook(lambda *_: clock.__setitem__(f"{name}_start", now()))
    module.register_forward_hook(lambda *_: _add(clock, name, now() - clock[f"{name}_start"]))


def _split_backward(trainer: Trainer, language_model: nn.Module, clock: dict[str, float]) -> None:
    """The head's backward is what comes before the gradient reaches the language model's last hidden states."""
    backward = timed(trainer.accelerator.backward, clock, "backward")

    def started(*args: Any, **kwargs: Any) -> Any:
        clock["backward_start"] = now()
        return backward(*args, **kwargs)

    def arrived(_: torch.Tensor) -> None:
        _add(clock, "head_backward", now() - clock["backward_start"])

    def watch(_module: nn.Module, _args: Any, output: Any) -> None:
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(arrived)

    trainer.accelerator.backward = started
    language_model.register_forward_hook(watch)


def _add(clock: dict[str, float], name: str, seconds: float) -> None:
    clock[name] += seconds
