"""What media are asked about, for connectors that read it: the words of the message in which a medium stands."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mllm.shapes import Tensor


def encode_questions(
    conversations: Sequence[Sequence[dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    most_tokens: Mapping[str, int],
) -> dict[str, Tensor]:
    """The model's inputs for the questions of a batch, one for each medium, in order of appearance.

    Args:
        conversations: The messages of each row.
        tokenizer: Of the connector, often not the language model's.
        most_tokens: Of each kind of media whose connector reads questions, how many tokens of one it reads.

    Returns:
        `{kind}_question_ids` and `{kind}_question_mask` [N, Q], padded on the right; nothing for kinds without media.
    """
    inputs: dict[str, Tensor] = {}
    for kind, most in most_tokens.items():
        texts = [text for messages in conversations for text in questions_of(messages, kind)]
        if not texts:
            continue
        rows = tokenizer(texts, truncation=True, max_length=most, padding=False)["input_ids"]
        ids = torch.zeros(len(rows), max(1, *map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[number, : len(row)] = 1
        inputs |= {f"{kind}_question_ids": ids, f"{kind}_question_mask": mask}
    return inputs


def questions_of(messages: Sequence[dict[str, Any]], kind: str) -> list[str]:
    """What each medium of a kind is asked about: the words of its message, which may be none.

    Example: of a message with an image, the text "What is this?" and another image, "What is this?" twice.
    """
    questions = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            continue
        words = [item["text"].strip() for item in content if item["type"] == "text"]
        question = " ".join(text for text in words if text)
        questions += [question for item in content if item["type"] == kind]
    return questions
