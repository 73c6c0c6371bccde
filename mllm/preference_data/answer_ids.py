"""Words of an assistant as token ids. They come from a processor's `encode_chat`, as in training."""

from typing import NamedTuple

from mllm.errors import RowError
from mllm.processing import TrainingProcessor

_QUESTION = {"role": "user", "content": "."}
_LEADS = ("it", "so", "5", "xyz")
"""Words in front of a text that continues a sentence: its tokens depend on there being one."""


class EncodedAnswer(NamedTuple):
    """An answer in its conversation, as the model reads it.

    Args:
        input_ids: The whole conversation.
        start: Where the words of the answer begin.
        end: One behind their last token: where the turn ends.
    """

    input_ids: list[int]
    start: int
    end: int

    @property
    def words(self) -> list[int]:
        """The ids of the answer's words."""
        return self.input_ids[self.start : self.end]


def encode_answer(
    processor: TrainingProcessor, text: str, *, messages: list[dict] | None = None, media_sizes: list | None = None
) -> EncodedAnswer:
    """Encode an answer to a question: to the one that `messages` end with, or to any.

    Args:
        processor: Of the model.
        text: The answer.
        messages: What it answers.
        media_sizes: Of each media item in them, in order.

    Raises:
        RowError: The messages are malformed, or the model's template does not say where an answer stands.
    """
    conversation = [*(messages or [_QUESTION]), {"role": "assistant", "content": [{"type": "text", "text": text}]}]
    ids, weights, _ = processor.encode_chat(conversation, media_sizes=media_sizes or [])
    end = len(ids) - next((place for place, weight in enumerate(reversed(weights)) if weight), len(ids))
    start = end
    while start and weights[start - 1]:
        start -= 1
    if start == end:
        raise RowError(
            f"no token of the answer {text!r:.60} is the assistant's",
            expected="a chat template that marks what the assistant says",
            do="choose another chat template",
        )
    return EncodedAnswer(ids, start, end - 1)  # the last one ends the turn


def continuation_ids(processor: TrainingProcessor, text: str) -> list[int]:
    """Ids of a text that continues an answer: " in the top left." behind some word.

    They are what such a word leaves of a longer answer. Where its tokens change with what follows (one of "it." may be
    "t."), another word is taken.
    """
    for word in _LEADS:
        lead, whole = encode_answer(processor, word).words, encode_answer(processor, word + text).words
        if whole[: len(lead)] == lead:
            return whole[len(lead) :]
    return encode_answer(processor, text).words
