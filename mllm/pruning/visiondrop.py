"""VisionDrop: visual tokens ranked by visual tokens, in the encoder and again on the way through the language model.

After Xu et al., "Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment", arXiv 2506.22283. No text
token has a say in what stays. In each stage the tokens that the others look at most stay as they are (the dominant
ones), and the rest are merged into a few at equal distances (the contextual ones).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from mllm.pruning.base import Cut, Item, Pruner, Row, Selection, top
from mllm.pruning.evidence import Evidence
from mllm.pruning.merge import Groups, groups_around_even_targets, means, merged_into, targets_plus_means
from mllm.pruning.schedules import geometric, lengths_of, merged_share, per_layer, starts_of
from mllm.pruning.scores import received
from mllm.shapes import Float, Int, Tensor

NUM_STRETCHES = 4
"""Of decoder layers between which tokens leave, as published."""
SCORINGS = ("faithful", "corrected")
RANKINGS = ("class", "received", "language")
MERGINGS: dict[str, Callable[[Tensor, Groups], Tensor]] = {"sum": targets_plus_means, "mean": means}


@dataclass
class VisionDrop(Pruner):
    """Drops and merges in front of the language model, and in front of three of its layers.

    `tokens` is the average over layers: the first stretch of layers sees more, the others each the same share of the
    one before. The published schedule for 32 of 576 in 32 layers is 48, 35, 26 and 19. A language model of fewer than
    four layers has a stretch for each; of one layer, that sees the average.

    In front of the language model the encoder ranks patches, and contextual tokens are merged on what the connector
    reads and led through it where it turns each patch into a vector by itself, else on its vectors. All views of an
    item (tiles, frames) share its budget. Where a connector mixes patches (a Q-Former, a resampler), the encoder's
    attention says nothing about vectors: they all enter, and leave in front of the first layer, by the scores that
    cuts go by. The class token, which the published code hands to the language model as one of the dominant tokens,
    does not enter here: connectors have not learned to read it.

    Args:
        contextual: Which share of the tokens that stay is merged ones, rounded up; 0 to drop without merging. An
            eighth is what was published (6 of 48, 5 of 35, 4 of 26, 3 of 19).
        first: Of how many times the average the first stretch is; 1.5 as published for pictures, 3 for videos.
        ranking: What enters: "class" for patches that the encoder's class token attends to most, as published (of an
            encoder without one as "received"); "received" for those that get most from all patches; "language" for
            all, to leave in front of the first layer, as where connectors mix.
        encoder_layer: Whose attention that is: -1 for the layer whose output the connector reads, as published.
        scoring: What tokens are ranked by in the language model, what they receive from all of their item: "faithful"
            for attention as the model pays it, causally, by which the first win whatever they show; "corrected" lets
            them see each other both ways.
        merging: "sum" adds to a token the mean of those that are merged into it, as published; "mean" takes the mean
            of all.
    """

    contextual: float = 0.125
    first: float = 1.5
    ranking: str = "class"
    encoder_layer: int = -1
    scoring: str = "corrected"
    merging: str = "sum"

    def __post_init__(self):
        super().__post_init__()
        self.check("contextual", 0 <= self.contextual < 1, "a share from 0 to below 1")
        self.check("first", self.first >= 1, "1 or more")
        self.check("ranking", self.ranking in RANKINGS, f"one of {', '.join(RANKINGS)}")
        self.check("scoring", self.scoring in SCORINGS, f"one of {', '.join(SCORINGS)}")
        self.check("merging", self.merging in MERGINGS, f"one of {', '.join(MERGINGS)}")

    @property
    def encoder_layers(self) -> tuple[int, ...]:  # type: ignore[override]
        """See `Pruner.encoder_layers`."""
        return () if self.ranking == "language" else (self.encoder_layer,)

    def cuts(self, num_layers: int) -> tuple[Cut, ...]:
        """See `Pruner.cuts`. At the first nothing leaves that was reduced in front of the language model."""
        return tuple(Cut(layer=start, scored_at=start) for start in starts_of(num_layers, NUM_STRETCHES))

    def counts(self, num_tokens: int, num_layers: int) -> list[int]:
        """See `Pruner.counts`."""
        lengths = lengths_of(starts_of(num_layers, NUM_STRETCHES), num_layers)
        return per_layer(self._schedule(num_tokens, num_layers), lengths)

    def select(self, item: Item, num_layers: int) -> Selection | None:
        """See `Pruner.select`."""
        num_tokens = len(item.vectors)
        count = self._schedule(num_tokens, num_layers)[0]
        if item.evidence is None or self.ranking == "language" or count >= num_tokens:
            return None
        evidence = item.evidence
        scores = evidence.of_vectors(self._patch_scores(evidence), without=float("-inf"))
        keys = evidence.of_vectors(evidence.mean_keys(self.encoder_layer).float())
        kept, groups = self._chosen(scores, keys, count)
        if groups is None:
            return Selection(kept)
        if evidence.features is None or evidence.connect is None:
            contextual = self._merged(item.vectors, groups)
        else:
            contextual = evidence.connect(self._merged(evidence.of_vectors(evidence.features), groups))
        return self._selection(item.vectors, kept, groups, contextual)

    def leaves_at_cut(self, cut: int, present: tuple[int, ...], entered: tuple[int, ...], num_layers: int) -> bool:
        """See `Pruner.leaves_at_cut`."""
        return any(
            here > self._schedule(before, num_layers)[cut] for here, before in zip(present, entered, strict=True)
        )

    def select_at_cut(self, row: Row, cut: int, entered: tuple[int, ...], num_layers: int) -> list[Selection | None]:
        """See `Pruner.select_at_cut`."""
        counts = [self._schedule(num_tokens, num_layers)[cut] for num_tokens in entered]
        return [
            self._select_in_row(row, item, count) if len(item) > count else None
            for item, count in zip(row.items, counts, strict=True)
        ]

    def _select_in_row(self, row: Row, item: Int[Tensor, " V"], count: int) -> Selection:
        at = item + (row.keys.shape[1] - row.queries.shape[1])
        both_ways = self.scoring == "corrected"
        scores = received(row.queries[:, item], row.keys, row.scaling, at, both_ways=both_ways)
        kept, groups = self._chosen(scores, row.keys[:, at].float().mean(dim=0), count)
        hidden = row.hidden[item]
        if groups is None:
            return Selection(kept)
        return self._selection(hidden, kept, groups, self._merged(hidden, groups))

    def _chosen(
        self, scores: Float[Tensor, " V"], keys: Float[Tensor, "V d"], count: int
    ) -> tuple[Int[Tensor, " n"], Groups | None]:
        """The places of the tokens that stay, dominant ones first, and what is merged into the others.

        Tokens with a score of minus infinity leave before any other, and are not merged.
        """
        num_merged = merged_share(count, self.contextual)
        if num_merged == 0 or count >= int(scores.isfinite().sum()):
            return top(scores, count), None
        dominant = top(scores, count - num_merged)
        is_rest = scores.isfinite().index_fill(0, dominant, value=False)
        groups = groups_around_even_targets(keys, is_rest.nonzero()[:, 0], num_merged)
        return torch.cat([dominant, groups.targets]), groups

    def _merged(self, values: Float[Tensor, "V D"], groups: Groups) -> Float[Tensor, "c D"]:
        return MERGINGS[self.merging](values, groups)

    @staticmethod
    def _selection(
        values: Float[Tensor, "V D"], kept: Int[Tensor, " n"], groups: Groups, contextual: Float[Tensor, "c D"]
    ) -> Selection:
        dominant = values[kept[: len(kept) - len(groups.targets)]]
        into = merged_into(kept, groups, len(values))
        return Selection(kept, torch.cat([dominant, contextual.to(values.dtype)]), into)

    def _patch_scores(self, evidence: Evidence) -> Float[Tensor, " patches"]:
        if self.ranking == "class" and evidence.num_prefix_tokens > 0:
            return evidence.class_attention(self.encoder_layer)
        return evidence.received_attention(self.encoder_layer)

    def _schedule(self, num_tokens: int, num_layers: int) -> tuple[int, ...]:
        return schedule(self.budget(num_tokens), num_tokens, num_layers, float(self.first))


@lru_cache(maxsize=1024)  # asked for anew at each cut, for each item of each row
def schedule(average: int, num_tokens: int, num_layers: int, first: float) -> tuple[int, ...]:
    """How many of an item's tokens each stretch of layers sees.

    Args:
        average: Over layers.
        num_tokens: Of the item.
        num_layers: Of the language model.
        first: See `VisionDrop`.
    """
    lengths = lengths_of(starts_of(num_layers, NUM_STRETCHES), num_layers)
    return tuple(geometric(average, lengths, first=first, most=num_tokens))
