"""Fine-tuning with fewer visual tokens: a pruner around each step, whose budget may differ from step to step."""

import random
import shlex
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import yaml
from peft import PeftModel
from transformers import PreTrainedModel

from mllm.errors import OptionError
from mllm.pruning import PRUNERS, Pruner, build_pruner
from mllm.pruning.anatomy import anatomy_of
from mllm.training.options import SftArguments


@dataclass(frozen=True)
class StepPruner:
    """Under which pruner each step is.

    Args:
        spec: Method and options but its budget, as programs are told of them.
        fewest: Of the budgets: a number of tokens of each picture, or a share of them.
        most: As `fewest`; 1.0 for all of them.
    """

    spec: str
    fewest: int | float
    most: int | float

    def at(self, step: int, *, seed: int) -> Pruner | None:
        """The pruner of a step, the same on all ranks and in a run that goes on; None where all tokens stay."""
        draw = random.Random(f"{seed}/pruner/{step}")
        if isinstance(self.fewest, int):
            return self.with_tokens(draw.randint(self.fewest, int(self.most)))
        share = draw.uniform(self.fewest, self.most)
        return None if share >= 1 else self.with_tokens(share)

    def with_tokens(self, tokens: int | float) -> Pruner:
        """The pruner with a budget.

        Raises:
            OptionError: It, or an option, has a value that it cannot have.
        """
        return replace(build_pruner(self.spec), tokens=tokens)

    def around(self, model: PreTrainedModel | PeftModel, *, step: int, seed: int) -> AbstractContextManager:
        """A context in which the model is pruned as in this step."""
        pruner = self.at(step, seed=seed)
        return nullcontext() if pruner is None else pruner(model)


def read_step_pruner(written: Any, where: str) -> StepPruner | None:
    """The option `pruner` of a training; None for none.

    Raises:
        OptionError: No method of that name, or an option that it has not, or not with this value.
    """
    if written is None:
        return None
    budget = written.get("tokens") if isinstance(written, Mapping) else None
    ends = tuple(budget) if isinstance(budget, list) else (budget, budget)
    is_budget = len(ends) == 2 and {type(end) for end in ends} in ({int}, {float}) and 0 < ends[0] <= ends[1]
    if not is_budget or "method" not in written:
        raise OptionError(
            f"pruner = {written!r} in {where}",
            expected="a mapping with `method`, options of that method, and `tokens`: a number, a share below 1, or a "
            "list of the least and the most, of one kind",
            do="write for example `pruner: {method: divprune, tokens: [0.3, 1.0]}`",
        )
    options = {name: value for name, value in written.items() if name not in ("method", "tokens")}
    words = [str(written["method"]), *(f"{name}={_as_yaml(value)}" for name, value in options.items())]
    found = StepPruner(shlex.join(words), *ends)
    found.with_tokens(ends[0])
    if ends[1] != 1.0:
        found.with_tokens(ends[1])
    return found


def check_step_pruner(args: SftArguments, where: str) -> None:
    """A pruner goes together with the other options.

    Raises:
        OptionError: It does not.
    """
    if args.pruner is None:
        return
    method = args.pruner.spec.split()[0]
    reasons = {
        "a preference training": type(args) is not SftArguments,
        "cross_tokens, which are learned under a pruner of their own": args.cross_tokens is not None,
        f"feature_cache: {method} asks the encoder about its patches, and a cache keeps nothing of that": (
            args.feature_cache is not None and bool(args.pruner.with_tokens(args.pruner.fewest).encoder_layers)
        ),
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise OptionError(f"pruner in {where}, and {reason}", expected="one of them", do="remove one of the two")


def check_trainable(model: PreTrainedModel | PeftModel, pruner: StepPruner, *, is_checkpointed: bool) -> None:
    """Only what leaves in front of the language model can be trained through.

    Args:
        model: With its modes applied.
        pruner: Of the training.
        is_checkpointed: Whether layers of the language model run again on the way back.

    Raises:
        OptionError: The model cannot be pruned, or the method works elsewhere in it.
    """
    anatomy = anatomy_of(model)
    found = pruner.with_tokens(pruner.fewest)
    if is_checkpointed and anatomy.body.config._attn_implementation.startswith("flash"):
        # Which takes gaps between positions for the ends of packed rows; the hooks that close them are gone by then.
        raise OptionError(
            "pruner, with gradient checkpointing of the language model and flash attention",
            expected="two of the three",
            do="load the model with attention sdpa, or train without checkpointing",
        )
    has_cuts = bool(found.cuts(len(anatomy.layers)))
    if has_cuts or pruner.spec.split()[0] == "crossget":
        place = "between layers of the language model" if has_cuts else "inside the encoder"
        raise OptionError(
            f"pruner: {pruner.spec}, whose tokens leave {place}",
            expected="a method that works in front of the language model: "
            + ", ".join(name for name, method in PRUNERS.items() if _is_in_front(method)),
            do="choose one of them" if has_cuts else "choose one of them, or write `cross_tokens: {r: 13}`",
        )
    with found(model):  # tells what the model lacks before anything is trained
        pass


def _is_in_front(method: type[Pruner]) -> bool:
    return not method().cuts(32) and method is not PRUNERS["crossget"]


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
