"""A row of a batch as text: the tokens that a model really reads, with what it learns of them."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from mllm.data.auditing.row_text import visible
from mllm.data.labels import IGNORED

LONGEST_RUN = 3
"""A token that stands there more often in a row is written once, with its number."""


def row_text(tokenizer: Any, batch: Mapping[str, Any], number: int) -> str:
    """A row of a padded batch, or a segment of a packed one, by its number.

    Returns:
        Its text, with what is learned in [[...]] and placeholders as "<image> x 576".
    """
    if "segment_lengths" in batch:
        start, length = sum(batch["segment_lengths"][:number]), batch["segment_lengths"][number]
        ids, labels = (batch[name][0, start : start + length].tolist() for name in ("input_ids", "labels"))
    else:
        length = int(batch["attention_mask"][number].sum())
        ids, labels = (batch[name][number, :length].tolist() for name in ("input_ids", "labels"))
    return tokens_text(tokenizer, ids, [label != IGNORED for label in labels])


def tokens_text(tokenizer: Any, ids: Sequence[int], is_learned: Sequence[bool]) -> str:
    """Ids as text, as `row_text` says."""
    parts: list[str] = []
    before: list[int] = []
    for learned, group in groupby(zip(ids, is_learned, strict=True), key=lambda pair: pair[1]):
        text = ""
        for piece in _pieces([token for token, _ in group]):
            # Decoders treat the first token of a text in their own way, so each piece is read behind the one before.
            known = _decode(tokenizer, before)
            run = len(set(piece)) == 1 and len(piece) > LONGEST_RUN
            found = _decode(tokenizer, [*before, *(piece[:1] if run else piece)])[len(known) :]
            text += f"{visible(found)} x {len(piece)}" if run else visible(found)
            before = piece[-LONGEST_RUN:]
        parts.append(f"[[{text}]]" if learned else text)
    return "".join(parts)


def _pieces(ids: Sequence[int]) -> list[list[int]]:
    """Runs of one token that are long, and what stands between them."""
    pieces: list[list[int]] = []
    is_open = False
    for _, group in groupby(ids):
        run = list(group)
        if len(run) > LONGEST_RUN:
            pieces.append(run)
            is_open = False
        elif is_open:
            pieces[-1] += run
        else:
            pieces.append(run)
            is_open = True
    return pieces


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
