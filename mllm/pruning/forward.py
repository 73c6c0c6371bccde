"""One forward of a language model under a pruner, from its first layer to its last."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Cache
from transformers.masking_utils import create_causal_mask

from mllm.errors import RowError
from mllm.pruning.anatomy import Anatomy
from mllm.pruning.base import Cut, Pruner, Row
from mllm.pruning.caches import Reached
from mllm.pruning.prefill import Stage, first_stage, gathered, hidden_at, next_stage, spread
from mllm.pruning.scoring import QueriesKeys, queries_and_keys
from mllm.pruning.statistics import ItemStages
from mllm.shapes import Bool, Float, Int, Tensor


class Forward:
    """Which tokens of a forward each layer sees.

    Args:
        anatomy: Of the model.
        pruner: Decides.
        cuts: Of the pruner.
        past: What the cache holds from earlier forwards, None for nothing.
    """

    def __init__(self, anatomy: Anatomy, pruner: Pruner, cuts: tuple[Cut, ...], *, past: Reached | None):
        self.anatomy = anatomy
        self.pruner = pruner
        self.cuts = cuts
        self.past = past
        self.stages: list[Stage] = []
        self.width = 0
        self.is_prompt = False
        self.is_packed = False
        self.is_scoring = False
        self.items: list[list[Int[Tensor, " _"]]] = []
        self.entered: list[tuple[int, ...]] = []
        self.positions: Tensor | None = None  # of the first stage
        self.inputs: dict[str, Any] = {}  # of the layers of the stage at hand
        self.scores: QueriesKeys | None = None

    def enter(self, kwargs: dict[str, Any], items: list[list[Int[Tensor, " _"]]]) -> dict[str, Any]:
        """The inputs of the language model, without what leaves in front of it.

        Args:
            kwargs: Its inputs.
            items: The columns of each row's visual items.
        """
        embeds: Tensor = kwargs["inputs_embeds"]
        num_rows, self.width = embeds.shape[:2]
        self.items, self.is_prompt = items, any(items)
        is_visual = self._is_visual(embeds)
        self.is_packed = kwargs.get("segment_lengths") is not None
        is_dropped = embeds[..., 0].isnan() & is_visual
        mask = kwargs.get("attention_mask")
        is_token = torch.ones_like(is_visual) if mask is None else mask[:, -self.width :].bool()
        stage = first_stage(is_token & ~is_dropped, self._past(0, embeds, mask))
        self.stages = [stage]
        self.positions = gathered(self._positions(kwargs, embeds, stage), stage.columns, -1)
        if self.pruner.positions == "compacted":
            self._check_plain_positions()
            self.positions = stage.compacted_positions()
        if self.is_prompt:
            self._note_items(is_dropped)
        entered = {
            **kwargs,
            "inputs_embeds": hidden_at(embeds, stage.columns, stage.is_token),
            "position_ids": self.positions,
            # Never None: without a mask transformers takes gaps between positions for the ends of packed rows.
            "attention_mask": stage.mask.long(),
        }
        if self.is_packed:
            entered |= self._packed(kwargs, stage)
        return entered | self._deep_features(kwargs, is_visual, stage)

    def before_layer(self, index: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """The inputs of a layer, as its stage has them; None where they are right."""
        if self.is_scoring:
            return None
        number = next((number for number, cut in enumerate(self.cuts) if cut.layer == index), None)
        hidden = args[0] if args else kwargs["hidden_states"]
        if number is not None:
            if not self.inputs:
                self.inputs = {"position_embeddings": kwargs.get("position_embeddings")}
            hidden = self._cut(number, index, hidden, args, kwargs)
        reads_here = self.is_prompt and any(cut.scored_at == index != cut.layer for cut in self.cuts)
        kwargs = {**kwargs, **{name: value for name, value in self.inputs.items() if name in kwargs}}
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs["hidden_states"] = hidden
        if reads_here:
            self.scores = self._read(index, args, kwargs)
        return args, kwargs

    def leave(self, hidden: Float[Tensor, "B M D"]) -> Float[Tensor, "B T D"]:
        """The last hidden states, each token's at its own column."""
        stage = self.stages[-1]
        if hidden.shape[1] == self.width and bool(stage.is_token.all()):
            in_order = torch.arange(self.width, device=hidden.device).expand_as(stage.columns)
            if torch.equal(stage.columns, in_order):
                return hidden
        return spread(hidden, stage, self.width)

    def reached(self) -> Reached:
        """Where the cache stands afterwards."""
        layers = (0, *(cut.layer for cut in self.cuts))
        gap = (self.past.gap if self.past else 0) + self.width - self.stages[0].columns.shape[1]
        return Reached(tuple((layer, stage.mask) for layer, stage in zip(layers, self.stages, strict=True)), gap)

    def _past(self, number: int, like: Tensor, mask: Tensor | None = None) -> Bool[Tensor, "B P"]:
        """Which slots of a stage's cache hold tokens."""
        if self.past is not None:
            return self.past.past[number][1]
        if number > 0:
            return self.stages[0].past  # filled without a pruner, or not at all: all layers alike
        earlier = (
            torch.ones(len(like), 0, dtype=torch.bool, device=like.device) if mask is None else mask[:, : -self.width]
        )
        return earlier.bool()

    def _positions(self, kwargs: Mapping[str, Any], embeds: Tensor, stage: Stage) -> Tensor:
        given = kwargs.get("position_ids")
        if given is not None:
            return given if given.shape[-2] == len(embeds) else given.expand(*given.shape[:-2], len(embeds), -1)
        seen = stage.past.shape[1] + (self.past.gap if self.past else 0)
        return torch.arange(seen, seen + self.width, device=embeds.device).expand(len(embeds), -1)

    def _check_plain_positions(self) -> None:
        assert self.positions is not None
        if self.positions.dim() != 2:
            raise RowError(
                "positions: compacted, for a model whose tokens have several positions each (M-RoPE)",
                expected="positions: original",
                do="set `positions` to original",
            )

    def _is_visual(self, embeds: Float[Tensor, "B T D"]) -> Bool[Tensor, "B T"]:
        found = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        for row, items in enumerate(self.items):
            for columns in items:
                found[row, columns] = True
        return found

    def _note_items(self, is_dropped: Bool[Tensor, "B T"]) -> None:
        """What is left of each item of each row."""
        statistics = self.pruner.statistics
        statistics.num_prompts += 1
        statistics.items, statistics.tokens_per_layer = [], [self.stages[0].counts]
        for row, items in enumerate(self.items):
            self.entered.append(tuple(len(item) for item in items))
            kept = [(~is_dropped[row, item]).nonzero()[:, 0] for item in items]
            statistics.items.append([ItemStages(len(item), {0: one}) for item, one in zip(items, kept, strict=True)])
        layers_before = self.cuts[0].layer if self.cuts else len(self.anatomy.layers)
        statistics.tokens_per_layer *= layers_before

    def _cut(
        self, number: int, index: int, hidden: Float[Tensor, "B M D"], args: tuple, kwargs: dict[str, Any]
    ) -> Float[Tensor, "B M D"]:
        """Go over to the next stage: some tokens leave, if this is a prompt."""
        stage, past = self.stages[-1], self._past(number + 1, hidden)
        rows = list(range(len(hidden)))
        if self.is_prompt:
            scores = self.scores
            if self.cuts[number].scored_at == index:
                scores = self._read(index, args, {**kwargs, **{k: v for k, v in self.inputs.items() if k in kwargs}})
            chosen = [self._choose(row, number, hidden, scores, kwargs.get("past_key_values")) for row in rows]
            new, sources = next_stage(stage, [slots for slots, _ in chosen], past, self.width)
            hidden = hidden_at(hidden, sources, new.is_token)
            hidden = self._with_values(hidden, chosen)
            self._note_cut(number, new)
        else:
            new = Stage(stage.columns, stage.is_token, past)
            sources = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
        self.stages.append(new)
        self._set_inputs(index, hidden, sources, kwargs)
        return hidden

    def _choose(
        self,
        row: int,
        number: int,
        hidden: Float[Tensor, "B M D"],
        scores: QueriesKeys | None,
        cache: Cache | None,
    ) -> tuple[Int[Tensor, " _"], list[tuple[Int[Tensor, " _"], Tensor]]]:
        """The slots of a row that stay, in their new order; and new values of some, by their places in that order."""
        stage, cut = self.stages[-1], self.cuts[number]
        slots = stage.is_token[row].nonzero()[:, 0]
        held = [stage.slots(columns, row) for columns in self.items[row]]
        if not any(map(len, held)):
            return slots, []
        assert scores is not None, "a cut behind the layer that is to decide"
        past = self._past(number + 1, hidden) if cut.scored_at == cut.layer else stage.past
        first = int(slots[0])  # slots without tokens come first
        seen = Row(
            hidden[row, slots],
            tuple(item - first for item in held),
            scores.queries[row, :, slots],
            torch.cat([_cached_keys(cache, cut.scored_at, row, past[row], scores), scores.keys[row, :, slots]], dim=1),
            scores.scaling,
        )
        selections = self.pruner.select_at_cut(seen, number, self.entered[row], len(self.anatomy.layers))
        order = torch.full((hidden.shape[1],), -1, dtype=torch.long, device=hidden.device)
        order[slots] = slots
        values = []
        for item, (slots_of_item, selection) in enumerate(zip(held, selections, strict=True)):
            if selection is None:
                continue
            kept = selection.kept
            if self.pruner.positions == "original":
                kept, by_place = kept.sort()
            else:
                by_place = torch.arange(len(kept), device=kept.device)
            order[slots_of_item] = -1
            order[slots_of_item[kept.sort().values]] = slots_of_item[kept]
            if selection.values is not None:
                values.append((slots_of_item[kept], selection.values[by_place]))
            self._note_merges(row, item, number, slots_of_item, selection.merged_into, selection.kept)
        left = order[order >= 0]
        places = {int(slot): place for place, slot in enumerate(left.tolist())}
        at = [torch.tensor([places[slot] for slot in own.tolist()], dtype=torch.long) for own, _ in values]
        return left, [(place.to(left.device), value) for place, (_, value) in zip(at, values, strict=True)]

    @staticmethod
    def _with_values(hidden: Float[Tensor, "B M D"], chosen: list) -> Float[Tensor, "B M D"]:
        for row, (left, values) in enumerate(chosen):
            num_empty = hidden.shape[1] - len(left)
            for places, value in values:
                hidden[row, places + num_empty] = value.to(hidden.dtype)
        return hidden

    def _read(self, index: int, args: tuple, kwargs: dict[str, Any]) -> QueriesKeys:
        self.is_scoring = True
        try:
            return queries_and_keys(self.anatomy.layers[index], args, kwargs)
        finally:
            self.is_scoring = False

    def _set_inputs(
        self, index: int, hidden: Float[Tensor, "B M D"], sources: Int[Tensor, "B M"], kwargs: dict[str, Any]
    ) -> None:
        """What the layers of the stage just begun get beside their hidden states."""
        stage, body = self.stages[-1], self.anatomy.body
        assert self.positions is not None
        embeddings = self.inputs["position_embeddings"]
        if self.pruner.positions == "compacted":
            self.positions = stage.compacted_positions()
            if embeddings is not None:
                embeddings = body.rotary_emb(hidden, position_ids=self.positions)
        else:
            self.positions = gathered(self.positions, sources, -1)
            if embeddings is not None:
                embeddings = tuple(gathered(one, sources, -2) for one in embeddings)
        mask = create_causal_mask(
            config=body.config,
            inputs_embeds=hidden,
            attention_mask=stage.mask,
            past_key_values=kwargs.get("past_key_values"),
            layer_idx=index,
        )
        self.inputs = {"position_ids": self.positions, "position_embeddings": embeddings, "attention_mask": mask}

    def _note_cut(self, number: int, stage: Stage) -> None:
        statistics = self.pruner.statistics
        layer = self.cuts[number].layer
        until = self.cuts[number + 1].layer if number + 1 < len(self.cuts) else len(self.anatomy.layers)
        statistics.tokens_per_layer += [stage.counts] * (until - layer)
        for row, items in enumerate(self.items):
            for item, columns in enumerate(items):
                left = stage.columns[row, stage.slots(columns, row)]
                statistics.items[row][item].kept[layer] = torch.searchsorted(columns, left.sort().values)

    def _note_merges(
        self,
        row: int,
        item: int,
        number: int,
        slots: Int[Tensor, " _"],
        merged_into: Tensor | None,
        kept: Int[Tensor, " _"],
    ) -> None:
        if merged_into is None:
            return
        columns = self.items[row][item]
        own = torch.searchsorted(columns, self.stages[-1].columns[row, slots])
        into = torch.full_like(columns, -1)
        into[own] = torch.where(merged_into >= 0, own[kept[merged_into.clamp(min=0)]], -1)
        self.pruner.statistics.items[row][item].merged_into[self.cuts[number].layer] = into

    def _packed(self, kwargs: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
        """Of a packed row: how long its segments are now."""
        ends = torch.tensor(kwargs["segment_lengths"], device=stage.columns.device).cumsum(0)
        segments = torch.bucketize(stage.columns[0], ends, right=True)
        lengths = torch.bincount(segments, minlength=len(ends)).tolist()
        return {"segment_lengths": tuple(lengths), "attention_mask": kwargs.get("attention_mask")}

    def _deep_features(
        self, kwargs: Mapping[str, Any], is_visual: Bool[Tensor, "B T"], stage: Stage
    ) -> dict[str, Any]:
        """Of Qwen3-VL: what is added to visual tokens behind its first layers, for those that are left."""
        if kwargs.get("visual_pos_masks") is None:
            return {}
        is_left = torch.zeros_like(is_visual).scatter(1, stage.columns, stage.is_token)
        marks = gathered(kwargs["visual_pos_masks"], stage.columns, -1) & stage.is_token
        left = is_left[kwargs["visual_pos_masks"]]
        return {
            "visual_pos_masks": marks,
            "deepstack_visual_embeds": [one[left] for one in kwargs["deepstack_visual_embeds"]],
        }


def _cached_keys(
    cache: Cache | None, layer: int, row: int, past: Bool[Tensor, " P"], like: QueriesKeys
) -> Float[Tensor, "H P d"]:
    """The keys that a layer's cache holds of a row's earlier tokens, a head for each query head."""
    num_heads = like.queries.shape[1]
    if cache is None or not bool(past.any()):
        return like.keys.new_zeros(num_heads, 0, like.keys.shape[-1])
    keys = cache.layers[layer].keys[row, :, past]
    return keys.repeat_interleave(num_heads // keys.shape[0], dim=0)
