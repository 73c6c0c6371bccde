"""Instruction-aware Q-Former: the queries read the features and the question (InstructBLIP, arXiv 2305.06500)."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

from mllm.errors import RowError
from mllm.models.connectors.qformer import QFormerConnector, QFormerOptions, without_flash
from mllm.shapes import Float, Tensor


@dataclass(frozen=True)
class InstructQFormerOptions(QFormerOptions):
    """Options of `InstructQFormerConnector`; the others are those of `QFormerOptions`.

    Args:
        tokenizer: Directory or Hub id of the tokenizer that questions are read with; by default that of `init_from`.
            Read when a model is assembled, and saved with its processor.
        vocab_size: Rows of the table of words; set when a model is assembled.
        max_question_tokens: Rows of the table of positions. Of a longer question only so many tokens are read.
    """

    tokenizer: str | None = None
    vocab_size: int = 30_522
    max_question_tokens: int = 512

    def __post_init__(self):
        super().__post_init__()
        self.check("vocab_size", self.vocab_size >= 1, "1 or more")
        self.check("max_question_tokens", self.max_question_tokens >= 1, "1 or more")


class TextQFormer(InstructBlipQFormerModel):
    """InstructBLIP's, without what it never uses: of the last layer only the queries go on."""

    def __init__(self, config: InstructBlipQFormerConfig):
        super().__init__(config)
        # Parameters without gradients stop a run on several ranks.
        self.encoder.layer[-1].intermediate = nn.Identity()
        self.encoder.layer[-1].output = _Unchanged()

    def get_correct_attn_implementation(self, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        """See `QFormer`."""
        return super().get_correct_attn_implementation(without_flash(requested_attention), *args, **kwargs)


class InstructQFormerConnector(QFormerConnector):
    """A Q-Former whose queries and question attend to one another in every layer.

    The question is what the message says in which the medium stands.
    """

    Options = InstructQFormerOptions

    def build_qformer(self) -> nn.Module:
        """The layers, and tables of words and positions."""
        config = InstructBlipQFormerConfig(
            vocab_size=self.options.vocab_size,
            max_position_embeddings=self.options.max_question_tokens,
            **self.options.layer_sizes(self.in_size),
        )
        return TextQFormer(config)

    def read(self, features, mask, question):
        """What the queries know after they have read normed features and the question.

        Raises:
            RowError: There is no question.
        """
        if question is None:
            raise RowError(
                "media without a question, for a connector that reads one",
                expected="question ids and mask for each item, such as `image_question_ids` and `image_question_mask`",
                do="take the inputs of `processor.encode_questions` with those of `processor.encode_media`",
            )
        queries = self.query_tokens.expand(len(features), -1, -1)
        outputs = self.qformer(
            input_ids=question.ids,
            attention_mask=nn.functional.pad(question.mask, (queries.shape[1], 0), value=1),
            query_embeds=queries,
            encoder_hidden_states=features,
            encoder_attention_mask=mask,
        )
        return outputs.last_hidden_state[:, : queries.shape[1]]


class _Unchanged(nn.Module):
    """In place of a layer that maps its first input and adds its second."""

    def forward(self, hidden: Float[Tensor, "..."], unchanged: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return unchanged
