"""Writes down what becomes of the items of one prompt, in the statistics of its pruner."""

from collections.abc import Mapping, Sequence

import torch

from mllm.pruning.base import Selection
from mllm.pruning.prefill import Stage
from mllm.pruning.statistics import ItemStages, Statistics
from mllm.shapes import Bool, Int, Tensor

Items = Sequence[Sequence[Int[Tensor, " _"]]]
"""The columns of each visual item of each row."""
Selections = Sequence[Sequence[Selection | None]]
"""What was decided in front of the language model, for each visual item of each row."""


class Notes:
    """Of one prompt.

    Args:
        statistics: Where it is written.
        items: Of the prompt.
        selections: Of these items.
    """

    def __init__(self, statistics: Statistics, items: Items, selections: Selections):
        self.statistics = statistics
        self.items = items
        self.selections = selections
        self.origins: list[list[Tensor]] = []  # which of its item's tokens stands in each of its columns

    def begin(self, is_dropped: Bool[Tensor, "B T"], counts: list[int], num_layers: int, *, compacted: bool) -> None:
        """What is left in front of the language model.

        Args:
            is_dropped: Which columns have left.
            counts: Tokens of each row.
            num_layers: How many layers see so many.
            compacted: Whether the tokens that stay stand in the order that the selections have them in.
        """
        self.statistics.num_prompts += 1
        self.statistics.items = []
        self.statistics.tokens_per_layer = [counts] * num_layers
        for row, items in enumerate(self.items):
            self.statistics.items.append([])
            self.origins.append([])
            for columns, selection in zip(items, self.selections[row], strict=True):
                places = torch.arange(len(columns), device=columns.device)
                origin = places
                if selection is not None and compacted:
                    origin = places.scatter(0, selection.kept.sort().values, selection.kept)
                left = (~is_dropped[row, columns]).nonzero()[:, 0]
                item = ItemStages(len(columns), {0: origin[left].sort().values})
                if selection is not None:
                    item.note_merges(0, selection.kept, selection.merged_into, places)
                self.statistics.items[row].append(item)
                self.origins[row].append(origin)

    def cut(self, layer: int, num_layers: int, stage: Stage) -> None:
        """What is left from a cut on.

        Args:
            layer: In front of which it is.
            num_layers: How many layers see so many.
            stage: That begins there.
        """
        self.statistics.tokens_per_layer = self.statistics.tokens_per_layer[:layer] + [stage.counts] * num_layers
        for row, items in enumerate(self.items):
            for item, columns in enumerate(items):
                left = self._places(stage, row, item, stage.slots(columns, row))
                self.statistics.items[row][item].kept[layer] = left.sort().values

    def merges(self, layer: int, stage: Stage, row: int, selections: Sequence[Selection | None]) -> None:
        """What is merged at a cut.

        Args:
            layer: In front of which it is.
            stage: That ends there.
            row: Of the batch.
            selections: For each of the row's items.
        """
        for item, selection in enumerate(selections):
            if selection is not None:
                own = self._places(stage, row, item, stage.slots(self.items[row][item], row))
                note = self.statistics.items[row][item]
                note.note_merges(layer, selection.kept, selection.merged_into, own)

    def _places(self, stage: Stage, row: int, item: int, slots: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Which of an item's tokens stand in these slots."""
        columns = torch.searchsorted(self.items[row][item], stage.columns[row, slots])
        return self.origins[row][item][columns]


def selections_of_rows(
    kinds: Sequence[Sequence[str]], selections: Mapping[str, Sequence[Selection | None]]
) -> list[list[Selection | None]]:
    """What was decided about the items of each row; None where that cannot be told any more.

    Args:
        kinds: Of which modality the items of each row are.
        selections: By modality, of each item as it was encoded. Since then `generate` may have repeated rows, each so
            many times behind one another.
    """
    nothing: list[list[Selection | None]] = [[None] * len(row) for row in kinds]
    encoded = sum(map(len, selections.values()))
    times = sum(map(len, kinds)) // encoded if encoded else 0
    if not times or any(list(row) != list(kinds[number - number % times]) for number, row in enumerate(kinds)):
        return nothing
    originals = [kind for row in kinds[::times] for kind in row]
    if any(originals.count(kind) != len(selections.get(kind, ())) for kind in {*originals, *selections}):
        return nothing
    rest = {kind: iter(chosen) for kind, chosen in selections.items()}
    rows = [[next(rest[kind]) for kind in row] for row in kinds[::times]]
    return [rows[number // times] for number in range(len(kinds))]
