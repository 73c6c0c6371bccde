"""The image encoder of BLIP-2 and its Q-Former as one encoder, whose features are the queries' (arXiv 2301.12597).

SPHINX has it as one of its encoders; Video-LLaMA lets it read every frame.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, Blip2QFormerModel, Blip2VisionModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from mllm.errors import CompositionError
from mllm.models.configuration import as_config
from mllm.models.encoder_checkpoints import load_part
from mllm.shapes import Pixels

LEFT_BEHIND = (
    "language_model.", "language_projection.", "vision_projection.", "text_projection.", "itm_head.", "embeddings.",
    "qformer.encoder.layer.", "qformer.embeddings.",
)  # fmt: skip
"""Prefixes of a checkpoint's keys: of its language model, its heads, and what reads text."""


class QueryEncoderConfig(PreTrainedConfig):
    """An image encoder and the Q-Former that reads it.

    Args:
        vision_config: Of the image encoder, a `Blip2VisionConfig`.
        qformer_config: A `Blip2QFormerConfig`.
        num_query_tokens: How many queries, which are the features of an image.
    """

    model_type = "mllm_query_encoder"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "qformer_config": AutoConfig}

    vision_config: Any = None
    qformer_config: Any = None
    num_query_tokens: int = 32

    def __post_init__(self, **kwargs):
        self.vision_config, self.qformer_config = as_config(self.vision_config), as_config(self.qformer_config)
        super().__post_init__(**kwargs)

    @property
    def image_size(self) -> int:
        """Side of the square that it sees."""
        return self.vision_config.image_size

    @property
    def hidden_size(self) -> int:
        """Width of its features."""
        return self.qformer_config.hidden_size


class QueryEncoder(PreTrainedModel):
    """Modules are named as in BLIP-2's checkpoints."""

    config: QueryEncoderConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: QueryEncoderConfig):
        super().__init__(config)
        self.vision_model = Blip2VisionModel(config.vision_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))
        self.qformer = Blip2QFormerModel(config.qformer_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The image encoder's."""
        return self.vision_model.get_input_embeddings()

    def forward(self, pixel_values: Pixels, **kwargs: Any) -> BaseModelOutput:
        """What the queries become after they have read the image."""
        seen = self.vision_model(pixel_values).last_hidden_state
        queries = self.query_tokens.expand(len(seen), -1, -1)
        read = self.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
        return BaseModelOutput(last_hidden_state=read, hidden_states=(read,))


def load_query_encoder(path: str) -> QueryEncoder:
    """Load image encoder, queries and Q-Former out of a BLIP-2 checkpoint.

    Raises:
        CompositionError: It is none, or keys are missing or left over.
    """
    whole = AutoConfig.from_pretrained(path)
    if whole.model_type != "blip-2":
        raise CompositionError(
            f"queries of {path}, a {whole.model_type!r} model",
            expected="a BLIP-2 checkpoint, which has an image encoder and a Q-Former",
            do="leave `queries` out for this encoder, or name a BLIP-2 checkpoint",
        )
    whole.qformer_config.use_qformer_text_input = False
    config = QueryEncoderConfig(
        vision_config=whole.vision_config,
        qformer_config=whole.qformer_config,
        num_query_tokens=whole.num_query_tokens,
    )
    return load_part(QueryEncoder, path, config=config, unexpected_prefixes=LEFT_BEHIND)
