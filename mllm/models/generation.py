"""Generation about media of all kinds: stock code encodes pictures and videos before it starts, sounds not."""

from typing import Any

import torch
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm.models.media import items_of_rows, take_media
from mllm.shapes import TokenIds


class MediaGenerationMixin(GenerationMixin):
    """`generate` for a model whose `model` has towers and `encode_media`."""

    model: Any
    config: Any

    @torch.no_grad()
    def generate(self, inputs: TokenIds | None = None, **kwargs) -> Any:
        """Generate text about media, which are encoded once, before it starts; stock code does so for two modalities.

        Ranks that share a sharded model call the towers equally often, with media or without.

        Args:
            inputs: Token ids; also as `input_ids`.
            **kwargs: The batch's media, and what transformers' `generate` takes.
        """
        given = dict(kwargs.pop("mm_encoder_outputs", None) or {})
        media = [take_media(modality, kwargs) for modality in self.model.towers]
        encoded, _ = self.model.encode_media(media, given=given, joins_ranks=True)
        given |= {name: BaseModelOutputWithPooling(pooler_output=items) for name, items in encoded.items()}
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if input_ids is not None:
            self.model.check_placeholders(input_ids, {name: one.pooler_output for name, one in given.items()})
        if given:
            kwargs["mm_encoder_outputs"] = given
        return super().generate(inputs, **kwargs)

    def _expand_multimodal_outputs(
        self, input_ids: TokenIds, mm_encoder_output: dict, expand_size: int = 1, **kwargs
    ) -> dict[str, BaseModelOutputWithPooling]:
        """Each row's media as often as the row is repeated (beams, several answers): A B, A B, not A A, B B."""
        expanded = {}
        for modality, outputs in mm_encoder_output.items():
            placeholder = getattr(self.config, f"{modality}_token_id")
            rows = items_of_rows(list(outputs.pooler_output), (input_ids == placeholder).sum(-1).tolist())
            items = [item for row in rows for item in row * expand_size]
            expanded[modality] = BaseModelOutputWithPooling(pooler_output=items)
        return expanded
