"""The loss on rows that are not trained on: over all tokens (or pairs) of all ranks, and by source."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mllm.data.batch_plan import deal_evenly
from mllm.data.collate import LeavingOut
from mllm.data.examples import Examples
from mllm.data.left_out import usable_batches
from mllm.inference.generation import eval_mode
from mllm.shapes import Tensor
from mllm.training.source_losses import SourceLosses, source_names


class Validation:
    """Computes the loss of a model on held-out rows.

    Args:
        examples: The rows.
        collate: Makes padded batches of them, with `sources`.
        unit: What the loss is a mean over, as the log names it.
        batch_size: Rows of a micro-batch.
        rank: This process.
        world_size: All processes. Each gets equally many micro-batches, of which the last may be empty.
        num_workers: Processes that load the rows.
    """

    def __init__(
        self,
        examples: Examples,
        collate: LeavingOut,
        *,
        unit: str,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ):
        self.examples = examples
        self.unit = unit
        self.names = source_names(index.source for index in examples.rows.indexes)
        # Rows of like length share a batch, the longest come first: what does not fit into memory is found at once.
        longest_first = np.argsort(-examples.lengths, kind="stable")
        starts = range(0, len(examples), batch_size * world_size)
        steps = [deal_evenly(longest_first[at : at + batch_size * world_size], world_size) for at in starts]
        self._loader = DataLoader(
            examples,
            batch_sampler=[step[rank].tolist() for step in steps],
            collate_fn=collate,
            num_workers=num_workers,
            generator=torch.Generator(),  # its own: training shall draw the same numbers, validated or not
        )

    def losses(
        self, model: torch.nn.Module, losses_of: Callable[[dict[str, Any]], tuple[Tensor, Tensor]]
    ) -> dict[str, int | float]:
        """The sum of all items' losses divided by their number, over all ranks, which come here together.

        Args:
            model: As it is wrapped for several ranks.
            losses_of: Of a micro-batch, as it was collated, the source and the loss of each item.

        Returns:
            As `SourceLosses.read` does.
        """
        found = SourceLosses(self.names, unit=self.unit)
        with eval_mode(model), torch.no_grad():
            for batch in usable_batches(self._loader, self.examples.account.add):
                found.add(*losses_of(batch))
        return {name: value for name, value in found.read().items() if name != "empty_micro_batches"}
