"""Stops a run whose loss is no number, before such a step is taken."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from mllm.data.collate import Collated
from mllm.data.mixture import Mixture
from mllm.errors import TrainingError
from mllm.training.checkpoint import latest_checkpoint

SHOWN_ROWS = 8


class FiniteLoss:
    """Knows which rows each micro-batch of the step in work holds, and what their loss was.

    Args:
        rows: What the positions of examples refer to.
    """

    def __init__(self, rows: Mixture):
        self.rows = rows
        self._positions: list[tuple[int, ...]] = []
        self._losses: list[torch.Tensor] = []

    def watch(self, batches: Iterable[Collated]) -> Iterator[Collated]:
        """Hand the micro-batches of a step on as they are asked for, and remember their rows."""
        self._positions, self._losses = [], []
        for collated in batches:
            self._positions.append(collated.positions)
            yield collated

    def add(self, loss: torch.Tensor) -> None:
        """The loss of the next micro-batch of the step, on this rank."""
        self._losses.append(loss.detach().float())

    def check(self, accelerator: Any, *, step: int, learning_rate: float, output_dir: Path) -> None:
        """Raise on all ranks if a loss of this step is no number on any; all come here, before the step is taken.

        Args:
            accelerator: To ask the other ranks.
            step: Its number.
            learning_rate: It would be taken with.
            output_dir: Of the run.

        Raises:
            TrainingError: One is.
        """
        losses = torch.stack(self._losses)
        is_broken = (~losses.isfinite()).any().float()
        if accelerator.reduce(is_broken, reduction="sum"):
            found = gather_object([self._describe(losses.tolist())])
            raise _not_a_number("a loss", found, step=step, learning_rate=learning_rate, output_dir=output_dir)

    def check_gradients(self, norm: float | None, *, step: int, learning_rate: float, output_dir: Path) -> None:
        """Raise if the norm of the step's gradients, the same on all ranks, is no number, though its losses are.

        Args:
            norm: Of all gradients; None where it is not known.
            step: Its number.
            learning_rate: It would be taken with.
            output_dir: Of the run.

        Raises:
            TrainingError: It is not.
        """
        if norm is None or math.isfinite(norm):
            return
        rows = [position for positions in self._positions for position in positions]
        found = gather_object([[f"gradients of norm {norm} after {self._name_rows(tuple(rows))}"]])
        raise _not_a_number("gradients", found, step=step, learning_rate=learning_rate, output_dir=output_dir)

    def _describe(self, losses: list[float]) -> list[str]:
        """Each broken micro-batch: its loss, and the rows in it."""
        positions = [*self._positions, *[()] * len(losses)]
        return [
            f"loss {loss} of {self._name_rows(rows)}"
            for loss, rows in zip(losses, positions, strict=False)
            if not math.isfinite(loss)
        ]

    def _name_rows(self, positions: tuple[int, ...]) -> str:
        if not positions:
            return "rows that are not known"
        names = []
        for position in positions[:SHOWN_ROWS]:
            row = self.rows[position]
            files = [str(item.path or item.blob) for item in row.media]
            names.append(row.name + (f" with {', '.join(files)}" if files else ""))
        more = len(positions) - SHOWN_ROWS
        return ", ".join(names) + (f" and {more} more" if more > 0 else "")


def _not_a_number(
    what: str, found: list[list[str]], *, step: int, learning_rate: float, output_dir: Path
) -> TrainingError:
    """The error that all ranks raise, with what each of them found."""
    checkpoint = latest_checkpoint(output_dir)
    kept = f"{checkpoint} is whole: the same command goes on from it" if checkpoint else "Nothing was saved"
    return TrainingError(
        f"step {step}, at a learning rate of {learning_rate:g}: "
        + "; ".join(line for lines in found for line in lines),
        expected=f"{what} that can be reckoned with: finite numbers",
        do="lower `learning_rate`, warm up longer (`warmup_steps`), or use bf16 in place of fp16; look at the "
        f"rows if it is always the same ones. {kept}",
    )
