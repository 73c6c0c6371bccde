"""The loss on rows that are not trained on: over all tokens of all ranks, and by source."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mllm.data.batch_plan import deal_evenly
from mllm.data.collate import LeavingOut
from mllm.data.examples import Examples
from mllm.data.left_out import usable_batches
from mllm.inference.generation import eval_mode
from mllm.training.source_losses import SourceLosses, source_names, with_token_sources


class Validation:
    """Computes the loss of a model on held-out rows.

    Args:
        examples: The rows.
        collate: Makes padded batches of them, with `sources`.
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
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ):
        self.examples = examples
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
        self, model: torch.nn.Module, prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    ) -> dict[str, int | float]:
        """The sum of all tokens' losses divided by their number, over all ranks, which come here together.

        Args:
            model: With a forward that gives `token_losses`; as it is wrapped for several ranks.
            prepare: Brings a batch to the model's device.

        Returns:
            As `SourceLosses.read` does.
        """
        found = SourceLosses(self.names)
        with eval_mode(model), torch.no_grad():
            for batch in usable_batches(self._loader, self.examples.account.add):
                inputs = {**prepare(with_token_sources(batch))}
                sources = inputs.pop("sources")
                found.add(sources, model(**inputs, use_cache=False).token_losses)
        return {name: value for name, value in found.read().items() if name != "empty_micro_batches"}
