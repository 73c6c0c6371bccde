"""One forward of a language model under a pruner, from its first layer to its last."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask

from mllm.models.segment_attention import segment_mask
from mllm.pruning.anatomy import Anatomy
from mllm.pruning.base import Cut, Embedded, Pruner, Row
from mllm.pruning.caches import Reached, all_tokens
from mllm.pruning.deep_features import DeepFeatures
from mllm.pruning.layer_inputs import cache_in, named_inputs, no_rotary_positions, with_values
from mllm.pruning.notes import Items, Notes, Selections
from mllm.pruning.prefill import (
    Stage,
    first_stage,
    gathered,
    hidden_at,
    next_stage,
    num_shared_at_end,
    places_in_segments,
    segments_of,
    slots_left,
    spread,
)
from mllm.pruning.scoring import QueriesKeys, queries_and_keys
from mllm.shapes import Bool, Float, Int, Tensor


class Forward:
    """Which tokens of a forward each layer sees.

    Args:
        anatomy: Of the model.
        pruner: Decides.
        cuts: Of the pruner.
        past: What the cache holds from earlier forwards, None where none of them was pruned.
        items: Of the prompt; none in a step that generates.
        selections: What was decided in front of the language model.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        pruner: Pruner,
        cuts: tuple[Cut, ...],
        *,
        past: Reached | None,
        items: Items,
        selections: Selections,
    ):
        self.anatomy = anatomy
        self.pruner = pruner
        self.cuts = cuts
        self.past = past
        self.items = items
        self.entered = [tuple(map(len, row)) for row in items]
        self.is_prompt = any(items)
        self.is_step = False
        self.is_compacted = pruner.positions == "compacted"
        self.notes = Notes(pruner.statistics, items, selections)
        self.stages: list[Stage] = []
        self.width = 0
        self.tail = 0
        self.is_scoring = False
        self.embeds: Tensor | None = None  # of the first stage
        self.positions: Tensor | None = None  # of the stage at hand
        self.inputs: dict[str, Any] = {}  # of the layers of the stage at hand
        self.scores: QueriesKeys | None = None
        self.deep: DeepFeatures | None = None  # those that are added here

    def enter(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of the language model, without what leaves in front of it.

        Args:
            kwargs: Its inputs.
        """
        embeds: Tensor = kwargs["inputs_embeds"]
        self.width = embeds.shape[1]
        self.is_step = self.width == 1 and not self.is_prompt
        if self.is_step:
            stage = self._whole(embeds, kwargs)
            self.tail = self.past.tail + self.width if self.past else 0
        else:
            stage = self._first_stage(embeds, kwargs)
        self.stages = [stage]
        self.embeds = hidden_at(embeds, stage.columns, stage.is_token)
        self.positions = self._first_positions(kwargs, embeds, stage)
        entered = {
            **kwargs,
            "inputs_embeds": self.embeds,
            "position_ids": self.positions,
            # Never None: without a mask transformers takes gaps between positions for the ends of packed rows.
            "attention_mask": stage.mask.long(),
        }
        if kwargs.get("segment_lengths") is not None:
            entered |= self._packed(kwargs, stage)
        self._set_unbroken_positions(stage)
        return entered | self._deep_inputs(kwargs, stage)

    def before_layer(
        self, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """The inputs of a layer, as its stage has them; None where they are right."""
        if self.is_scoring:
            return None
        hidden, kwargs = named_inputs(layer, args, kwargs)
        if self.deep is not None and 0 < index <= len(self.deep.features):
            hidden = self.deep.added(hidden, index - 1, self.stages[-1])
        for number, cut in enumerate(self.cuts):
            if cut.layer == index:
                hidden = self._cut(number, hidden, kwargs)
        kwargs |= {name: value for name, value in self.inputs.items() if name in kwargs}
        if self.is_prompt and any(cut.scored_at == index != cut.layer for cut in self.cuts):
            self.scores = self._read(index, hidden, kwargs)
        return (hidden,), kwargs

    def leave(self, outputs: Any) -> None:
        """Put each token's hidden states at its own column."""
        if self.is_step:
            return
        outputs.last_hidden_state = self._spread(outputs.last_hidden_state, self.stages[-1])
        if outputs.hidden_states is not None:
            # Of the embeddings first, then of each layer.
            outputs.hidden_states = tuple(
                None if one is None else self._spread(one, self._stage_at(max(number - 1, 0)))
                for number, one in enumerate(outputs.hidden_states)
            )

    def reached(self) -> Reached:
        """Where the cache stands afterwards."""
        layers = (0, *(cut.layer for cut in self.cuts))
        gap = (self.past.gap if self.past else 0) + self.width - self._stage_at(0).columns.shape[1]
        past = tuple(self._stage_at(layer).mask for layer in layers)
        return Reached(layers, past, gap, self.tail, self.pruner.positions)

    def _stage_at(self, layer: int) -> Stage:
        """The stage that a layer sees."""
        return self.stages[sum(cut.layer <= layer for cut in self.cuts)]

    def _spread(self, hidden: Float[Tensor, "B M D"], stage: Stage) -> Float[Tensor, "B T D"]:
        in_order = torch.arange(self.width, device=hidden.device)
        if hidden.shape[1] == self.width and bool(stage.is_token.all()) and bool((stage.columns == in_order).all()):
            return hidden
        return spread(hidden, stage, self.width)

    def _first_stage(self, embeds: Float[Tensor, "B T D"], kwargs: Mapping[str, Any]) -> Stage:
        """What is left in front of the first layer."""
        is_visual = self._is_visual(embeds)
        is_dropped = embeds[..., 0].isnan() & is_visual
        mask = kwargs.get("attention_mask")
        is_token = torch.ones_like(is_visual) if mask is None else mask[:, -self.width :].bool()
        stage = first_stage(is_token & ~is_dropped, self._first_past(kwargs, embeds))
        self._set_tail(is_token & ~is_visual)
        if self.is_prompt:
            num_layers = self.cuts[0].layer if self.cuts else len(self.anatomy.layers)
            self.notes.begin(is_dropped, stage.counts, num_layers, compacted=self.is_compacted)
        return stage

    def _whole(self, embeds: Float[Tensor, "B T D"], kwargs: Mapping[str, Any]) -> Stage:
        """A step that generates: each row has its token, and nobody has to look, which a device would wait for."""
        is_token = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        columns = torch.zeros_like(is_token, dtype=torch.long)
        return Stage(columns, is_token, self._first_past(kwargs, embeds))

    def _first_past(self, kwargs: Mapping[str, Any], embeds: Tensor) -> Bool[Tensor, "B P"]:
        """Which slots of the first layer's cache hold tokens."""
        mask = kwargs.get("attention_mask")
        if self.past is not None:
            return self.past.past[0]
        return all_tokens(kwargs.get("past_key_values"), embeds) if mask is None else mask[:, : -self.width].bool()

    def _first_positions(self, kwargs: Mapping[str, Any], embeds: Tensor, stage: Stage) -> Tensor:
        if self.is_compacted:
            lengths = kwargs.get("segment_lengths")
            return stage.compacted_positions() if lengths is None else self._packed_positions(stage, lengths)
        given = kwargs.get("position_ids")
        if given is None:
            seen = stage.past.shape[1] + (self.past.gap if self.past else 0)
            given = torch.arange(seen, seen + self.width, device=embeds.device)[None]
        return gathered(given.expand(*given.shape[:-2], len(embeds), -1), stage.columns, -1)

    def _set_tail(self, is_text: Bool[Tensor, "B T"]) -> None:
        """How many columns at the end, earlier ones included, nothing was taken out of."""
        shared = num_shared_at_end(is_text)
        self.tail = shared + (self.past.tail if self.past and shared == self.width else 0)

    def _set_unbroken_positions(self, stage: Stage) -> None:
        """Flash attention takes gaps between positions for packing; rotations, which need them, are made before."""
        if self.anatomy.body.config._attn_implementation.startswith("flash"):
            width = stage.columns.shape[1]
            self.inputs["position_ids"] = torch.arange(width, device=stage.columns.device).expand_as(stage.columns)

    def _is_visual(self, embeds: Float[Tensor, "B T D"]) -> Bool[Tensor, "B T"]:
        found = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        for row, items in enumerate(self.items):
            for columns in items:
                found[row, columns] = True
        return found

    def _cut(self, number: int, hidden: Float[Tensor, "B M D"], kwargs: dict[str, Any]) -> Float[Tensor, "B n D"]:
        """Go over to the next stage: some tokens leave, if this is a prompt."""
        cut, stage = self.cuts[number], self.stages[-1]
        past = self.past.past[number + 1] if self.past else self.stages[0].past
        if self.is_prompt and self._anyone_leaves(number):
            scores = self.scores
            if cut.scored_at == cut.layer:
                scores = self._read(cut.layer, hidden, kwargs | {k: v for k, v in self.inputs.items() if k in kwargs})
            assert scores is not None, "a cut behind the layer that is to decide"
            cache = cache_in(kwargs)
            chosen = [self._choose(row, number, hidden, scores, cache) for row in range(len(hidden))]
            new, sources = next_stage(stage, [slots for slots, _ in chosen], past, self.width)
            hidden = with_values(hidden_at(hidden, sources, new.is_token), chosen)
        else:
            new = Stage(stage.columns, stage.is_token, past)
            sources = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
        self.scores = None
        self.stages.append(new)
        if self.is_prompt:
            until = self.cuts[number + 1].layer if number + 1 < len(self.cuts) else len(self.anatomy.layers)
            self.notes.cut(cut.layer, until - cut.layer, new)
        self._set_inputs(cut.layer, hidden, sources, kwargs)
        return hidden

    def _anyone_leaves(self, number: int) -> bool:
        stage, num_layers = self.stages[-1], len(self.anatomy.layers)
        return any(
            self.pruner.leaves_at_cut(
                number, tuple(len(stage.slots(columns, row)) for columns in items), self.entered[row], num_layers
            )
            for row, items in enumerate(self.items)
            if items
        )

    def _choose(
        self, row: int, number: int, hidden: Float[Tensor, "B M D"], scores: QueriesKeys, cache: Cache | None
    ) -> tuple[Int[Tensor, " _"], list[tuple[Int[Tensor, " _"], Tensor]]]:
        """The slots of a row that stay, in their new order; and new values of some, by their places in that order."""
        stage, cut = self.stages[-1], self.cuts[number]
        slots = stage.is_token[row].nonzero()[:, 0]
        held = [stage.slots(columns, row) for columns in self.items[row]]
        if not any(map(len, held)):
            return slots, []
        first = int(slots[0])  # slots without tokens come first
        seen = Row(
            hidden[row, slots],
            tuple(item - first for item in held),
            scores.queries[row][:, slots],
            torch.cat([self._cached_keys(cache, cut.scored_at, row, scores), scores.keys[row][:, slots]], dim=1),
            scores.scaling,
            self._embedded(row),
        )
        selections = self.pruner.select_at_cut(seen, number, self.entered[row], len(self.anatomy.layers))
        self.notes.merges(cut.layer, stage, row, selections)
        return slots_left(slots, held, selections, is_reordered=self.is_compacted)

    def _cached_keys(self, cache: Cache | None, layer: int, row: int, like: QueriesKeys) -> Float[Tensor, "H P d"]:
        """The keys that a layer's cache holds of a row's earlier tokens, a head for each query head."""
        num_heads = like.queries.shape[1]
        past = self.stages[0].past[row]
        if self.past is not None:
            past = self.past.past[sum(cut.layer <= layer for cut in self.cuts)][row]
        if cache is None or not bool(past.any()):
            return like.keys.new_zeros(num_heads, 0, like.keys.shape[-1])
        keys = cache.layers[layer].keys[row].to(like.keys.device)[:, past]
        return keys.repeat_interleave(num_heads // keys.shape[0], dim=0)

    def _embedded(self, row: int) -> Embedded:
        """The tokens of a row as they entered."""
        stage = self.stages[0]
        slots = stage.is_token[row].nonzero()[:, 0]
        items = tuple(stage.slots(columns, row) - int(slots[0]) for columns in self.items[row])
        assert self.embeds is not None
        return Embedded(self.embeds[row, slots], items)

    def _read(self, index: int, hidden: Float[Tensor, "B M D"], kwargs: dict[str, Any]) -> QueriesKeys:
        self.is_scoring = True
        try:
            return queries_and_keys(self.anatomy.layers[index], (hidden,), kwargs)
        finally:
            self.is_scoring = False

    def _set_inputs(
        self, index: int, hidden: Float[Tensor, "B M D"], sources: Int[Tensor, "B M"], kwargs: dict[str, Any]
    ) -> None:
        """What the layers of the stage just begun get beside their hidden states."""
        stage, body = self.stages[-1], self.anatomy.body
        assert self.positions is not None
        embeddings = self.inputs.get("position_embeddings", kwargs.get("position_embeddings"))
        if embeddings is None:
            raise no_rotary_positions(body)
        if self.is_compacted:
            self.positions = stage.compacted_positions()
            embeddings = body.rotary_emb(hidden, self.positions)
        else:
            self.positions = gathered(self.positions, sources, -1)
            if isinstance(embeddings, Tensor):  # complex numbers, of DeepSeek
                embeddings = gathered(embeddings, sources, -2)
            else:
                embeddings = tuple(gathered(one, sources, -2) for one in embeddings)
        mask = create_causal_mask(
            config=body.config,
            inputs_embeds=hidden,
            attention_mask=stage.mask,
            past_key_values=cache_in(kwargs),
            layer_idx=index,
        )
        self.inputs = {"position_ids": self.positions, "position_embeddings": embeddings, "attention_mask": mask}
        self._set_unbroken_positions(stage)

    def _packed(self, kwargs: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
        """Of a packed row: how long its segments are now, and the mark that it has several."""
        segments = segments_of(stage.columns[0], kwargs["segment_lengths"])
        lengths = torch.bincount(segments, minlength=len(kwargs["segment_lengths"])).tolist()
        inputs: dict[str, Any] = {"segment_lengths": tuple(lengths)}
        if len(lengths) > 1:
            width = stage.columns.shape[1]
            inputs["attention_mask"] = segment_mask(
                1, width, width, allow_is_causal_skip=False, device=stage.columns.device
            )
        return inputs

    @staticmethod
    def _packed_positions(stage: Stage, lengths: tuple[int, ...]) -> Int[Tensor, "1 M"]:
        return places_in_segments(segments_of(stage.columns[0], lengths))[None]

    def _deep_inputs(self, kwargs: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
        """Of Qwen3-VL; where a cut comes in front of the last of them, they are not the language model's business."""
        deep = DeepFeatures.of(kwargs)
        if deep is None:
            return {}
        if self.cuts and self.cuts[0].layer < len(deep.features):
            self.deep = deep
            return {"visual_pos_masks": None, "deepstack_visual_embeds": None}
        return deep.inputs(stage)
