"""Rows as text for a terminal: coloured, or with marks where there are no colours."""

import re
from itertools import groupby

from mllm.data.auditing.render import Side, Token, render_row
from mllm.data.schema import MediaItem, Row
from mllm.processing import TrainingProcessor

RESET = "\x1b[0m"
COLOURS = {"system": "35", "user": "34", "assistant": "32", "": "90"}
LEARNED, CONTROL, MEDIA = "30;42", "2", "33;1"

# Controls, and what reorders or hides text: a terminal would obey them, a reader would be deceived.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""The text with every character that would not be seen written as its code; line feed and tab stay.

    Example: an escape sequence "\x1b[31m" becomes the seven characters `\x1b[31m` that one sees here.
    """
    return _INVISIBLE.sub(lambda match: _code(match[0]), text)


def legend(*, colour: bool, has_tokens: bool) -> str:
    """What the colours and marks mean."""
    if not has_tokens:
        return "Texts and media only: without a tokenizer (--model) nobody can say what the tokens are."
    if not colour:
        return "[[...]]: what the model learns to say; the rest is only read. <image> x 576: 576 tokens of an image."
    roles = ", ".join(_coloured(role, COLOURS[role]) for role in ("system", "user", "assistant"))
    learned = _coloured("learned", LEARNED)
    control, media = _coloured("<|control|>", CONTROL), _coloured("<image> x 576", MEDIA)
    return (
        f"{roles}: read only. {learned}: what the model learns to say. {control} tokens, {media} tokens of an image."
    )


def row_text(row: Row, processor: TrainingProcessor | None = None, *, colour: bool) -> str:
    """A row, side by side below each other, token by token."""
    head = f"--- {visible(row.id)}  {visible(row.source)}  {visible(row.where)}"
    return "\n".join([head, *(_side_text(side, colour) for side in render_row(row, processor))])


def _side_text(side: Side, colour: bool) -> str:
    lines = [f"  [{side.title}]"] if side.title else []
    lines += [f"  {number}. {_media_text(item)}" for number, item in enumerate(side.media, start=1)]
    if side.problem:
        lines.append(f"  cannot be trained on: {visible(side.problem)}")
    if side.length:
        lines.append(f"  {side.length:,} tokens, {side.num_learned:,} learned from")
    return "\n".join([*lines, _tokens_text(side.tokens, colour)])


def _media_text(item: MediaItem) -> str:
    name = item.path if item.blob is None else f"{item.blob.container} (inside)"
    size = f", {item.width} x {item.height}" if item.height else ""
    seconds = f", {item.seconds:.1f} s" if item.seconds else ""
    return f"{item.kind} {visible(str(name))}{size}{seconds}"


def _tokens_text(tokens: list[Token], colour: bool) -> str:
    key = _style if colour else _is_learned
    parts = []
    for style, alike in groupby(tokens, key=key):
        text = "".join(map(_token_text, alike))
        if colour:
            parts.append(_coloured(text, str(style)))
        else:
            parts.append(f"[[{text}]]" if style else text)
    return "".join(parts)


def _token_text(token: Token) -> str:
    if token.media < 0:
        return visible(token.text)
    return f"<{token.kind}> x {token.count}" if token.ids else f"<{token.kind}>"


def _is_learned(token: Token) -> bool:
    return token.weight > 0


def _style(token: Token) -> str:
    if token.media >= 0:
        return MEDIA
    return ";".join([LEARNED if _is_learned(token) else COLOURS[token.role], *([CONTROL] * (token.kind == "control"))])


def _coloured(text: str, style: str) -> str:
    return f"\x1b[{style}m{text}{RESET}"


def _code(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
