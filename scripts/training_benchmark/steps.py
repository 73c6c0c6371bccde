"""What a trainer's steps take, and what is in them, seen from outside."""

from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback

from training_benchmark.shares import now


class StepClock(TrainerCallback):
    """Notes when each step ended; what is read and prepared for a step is part of it."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(now())

    @property
    def step_seconds(self) -> float:
        """The mean of all steps but the first, which also warms up."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


def watch_batches(trainer: Trainer, texts_of: Callable[[Any], dict[str, Any]]) -> dict[str, list[int]]:
    """Have a trainer note the batches that it collates; returns where: rows, padded lengths and encoded images.

    Args:
        trainer: Not yet training, without workers.
        texts_of: From what its collator gives to the batch.
    """
    seen: dict[str, list[int]] = {"rows": [], "padded_length": [], "images": []}
    collate = trainer.data_collator

    def collated(examples: list[Any]) -> Any:
        found = collate(examples)
        batch = texts_of(found)
        rows, length = batch["input_ids"].shape
        for name, value in (("rows", rows), ("padded_length", length), ("images", len(batch["pixel_values"]))):
            seen[name].append(int(value))
        return found

    trainer.data_collator = collated
    return seen
