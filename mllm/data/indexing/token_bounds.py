"""An upper bound of every row's tokens, from numbers the index holds: no text is read."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError

from mllm.data.indexing.index import RowIndex
from mllm.data.schema import MEDIA_KINDS
from mllm.processing import TrainingProcessor
from mllm.sizes import LONGEST_SOUND

# How often longer than before a text can be, in UTF-8, behind each part of a normalizer. NFC has a column of its own.
_GROWTH = {
    "NFC": 1, "ByteLevel": 1, "Strip": 1, "StripAccents": 1, "Nmt": 1, "Prepend": 1, "NFD": 3, "Lowercase": 2,
    "NFKC": 11, "NFKD": 11, "Precompiled": 11, "BertNormalizer": 9,
}  # fmt: skip
_BOX_GROWTH = 4  # "[1,2,3,4]" may become "[0.001,0.002,0.003,0.004]"
_AROUND_IMAGE = 4
_SIDE = 2**30 - 1
_USER = {"role": "user", "content": "5"}
_ASSISTANT = {"role": "assistant", "content": "5"}
_SYSTEM = {"role": "system", "content": "5"}


def token_bounds(index: RowIndex, processor: TrainingProcessor) -> np.ndarray:
    """At least as many tokens as `count_tokens` will find, for every row, uint32.

    Why it holds. A token is made of at least one character, or of at least one byte where the tokenizer falls back to
    bytes: so a text has no more tokens than UTF-8 bytes, behind the normalizer. NFC can make a text longer, and the
    index knows by how much; for other normalizers the worst case is assumed. A blank that is put in front of a text is
    one token more for each stretch between two special tokens. Around the words a template writes a text of its own:
    we take the longest it writes for any message, once for every message and once more, and each byte of it twice,
    which leaves room for those blanks. Media count as their rules say. Boxes can grow with their numbers.

    This supposes of a template that is not ours that it writes no text twice, and for a later message no more of its
    own than for the first ones.
    """
    growth, column = _text_growth(processor.tokenizer.backend_tokenizer.to_str())
    per_row, per_message = _template_bytes(processor)
    texts = index.column(column).astype(np.int64) * growth
    texts *= np.where(index.column("has_boxes"), _BOX_GROWTH, 1)
    # The answer of a preference is no message of its row; `per_row` has room for it.
    messages = index.column("num_messages").astype(np.int64)
    bounds = texts + 2 * (per_row + per_message * messages) + media_tokens(index, processor, around=_AROUND_IMAGE)
    return bounds.clip(max=0xFFFFFFFF).astype(np.uint32)


def media_tokens(index: RowIndex, processor: TrainingProcessor, *, around: int = 0) -> np.ndarray:
    """The tokens that the media of every row become, of sounds and videos at most; and `around` more for each item."""
    rows, *columns = index.media_columns("kind", "height", "width", "seconds", "start", "end")
    if not processor.media_kinds or not len(rows):
        return np.zeros(len(index), np.int64)
    # One number for each size: sorting rows of an array takes seconds.
    sizes, which = np.unique(_packed(*columns), return_inverse=True)
    # A row with media of other kinds is refused. A template may write a newline behind a placeholder.
    tokens = [
        _most_tokens(processor, kind, (size >> 30) & _SIDE, size & _SIDE) + around
        if (kind := MEDIA_KINDS[size >> 60]) in processor.media_kinds
        else 0
        for size in sizes.tolist()
    ]
    return np.bincount(rows, np.array(tokens)[which], minlength=len(index)).astype(np.int64)


def _packed(kinds: np.ndarray, heights: np.ndarray, widths: np.ndarray, *cuts: np.ndarray) -> np.ndarray:
    """Kind and size of each item in one number: sides of an image, whole seconds of what is cut of anything else.

    Seconds are rounded up, so that there are few sizes: a longer sound or video has no fewer tokens.
    """
    lengths, starts, ends = cuts
    seconds = np.fmin(lengths, ends) - np.nan_to_num(starts)
    is_image = kinds == MEDIA_KINDS.index("image")
    upper = np.where(is_image, heights, 0).astype(np.int64)
    lower = np.where(is_image, widths, np.ceil(seconds.clip(0, _SIDE))).astype(np.int64)
    return (kinds.astype(np.int64) << 60) + (upper << 30) + lower


def _most_tokens(processor: TrainingProcessor, kind: str, upper: int, lower: int) -> int:
    if kind == "image":
        return processor.most_tokens((upper, lower))
    if kind == "video":
        return processor.most_tokens((0, 0, 0, float(lower)))  # its frames are those that its rule takes at most
    # Rounded up, a sound may be longer than the longest that the model reads.
    return processor.most_tokens((float(lower),)) or processor.most_tokens((LONGEST_SOUND,))


def _template_bytes(processor: TrainingProcessor) -> tuple[int, int]:
    """Bytes that the template writes of its own: at most once a conversation, two messages included, and a message."""

    def size(*messages: dict[str, str]) -> int:
        return len(processor.apply_chat_template(list(messages), tokenize=False).encode())

    one, two = size(_USER, _ASSISTANT), size(_USER, _ASSISTANT, _USER, _ASSISTANT)
    try:
        with_system = size(_SYSTEM, _USER, _ASSISTANT)
    except TemplateError:
        with_system = one  # such a row is refused
    return max(one, with_system) + processor.tokenizer.num_special_tokens_to_add(pair=False), two - one


def _text_growth(tokenizer: str) -> tuple[int, str]:
    """The factor of the normalizer, and the column of the index that it applies to."""
    fields = json.loads(tokenizer)
    vocabulary = {token if isinstance(token, str) else token[0] for token in fields["model"].get("vocab", {})}
    growth = 1
    column = "num_bytes"
    for part in _parts(fields.get("normalizer")):
        if part["type"] == "NFC":
            column = "num_nfc_bytes"
        if part["type"] == "Replace":
            growth *= _replacement_growth(part, vocabulary)
        else:
            growth *= _GROWTH.get(part["type"], max(_GROWTH.values()))
    return growth, column


def _replacement_growth(part: dict[str, Any], vocabulary: set[str]) -> int:
    """Characters that the vocabulary holds are one token at most, however many bytes they have."""
    content = part["content"]
    units = sum(1 if letter in vocabulary else len(letter.encode()) for letter in content)
    pattern = part["pattern"].get("String", "")
    return max(1, -(-units // max(1, len(pattern.encode()))))


def _parts(normalizer: dict[str, Any] | None) -> Sequence[dict[str, Any]]:
    if normalizer is None:
        return []
    if normalizer["type"] == "Sequence":
        return [part for inner in normalizer["normalizers"] for part in _parts(inner)]
    return [normalizer]
