"""The messages of a conversation: their form is checked here, before a template sees them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mllm.errors import RowError

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_KEYS = frozenset({"role", "content", "loss"})


def plain_messages(
    messages: Sequence[dict[str, Any]], *, where: str, kinds: tuple[str, ...] = ("image",)
) -> tuple[list[dict[str, Any]], list[str]]:
    """Copies that hold what a template may read, and the kinds of the media items in them, in order.

    Neighbouring texts of a message become one: a control token must not arise where two meet. Keys whose value is None
    count as absent: Arrow tables add them.

    Raises:
        RowError: A message has another form than `role`, `content` and optionally `loss`.
    """
    if not messages:
        raise RowError(f"{where}: no messages", expected="at least one message", do="drop the row")
    plain = []
    found: list[str] = []
    for number, message in enumerate(messages):
        here = f"{where}, message {number}"
        _check_keys(message, here)
        content = message["content"]
        if not isinstance(content, str):
            content = _plain_items(content, here, kinds)
            found += (item["type"] for item in content if item["type"] != "text")
        plain.append({"role": message["role"], "content": content})
    return plain, found


def with_lists(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies in which every content is a list of items."""
    return [
        {**turn, "content": [{"type": "text", "text": turn["content"]}]} if isinstance(turn["content"], str) else turn
        for turn in turns
    ]


def words_of(turns: list[dict[str, Any]]) -> Iterator[str]:
    """Everybody's texts, of messages as `plain_messages` gives them."""
    for turn in turns:
        if isinstance(turn["content"], str):
            yield turn["content"]
        else:
            yield from (item["text"] for item in turn["content"] if item["type"] == "text")


def rewritten(turns: list[dict[str, Any]], rewrite: Callable[[str], str]) -> list[dict[str, Any]]:
    """Copies with every text passed through `rewrite`."""
    return [{"role": turn["role"], "content": _rewritten_content(turn["content"], rewrite)} for turn in turns]


def assistant_weights(messages: Sequence[dict[str, Any]], *, num_spans: int, where: str) -> list[float]:
    """The weight of each generation block: that of the assistant's message it renders.

    Raises:
        RowError: A `loss` is no bool or weight, stands at somebody else's message, or cannot be assigned to a block.
    """
    weights = []
    for number, message in enumerate(messages):
        loss = message.get("loss")
        if loss is not None and not (isinstance(loss, bool | int | float) and 0 <= loss < float("inf")):
            raise RowError(
                f"{where}, message {number}: loss = {loss!r}",
                expected="true, false or a weight of 0 or more",
                do="mend the message's `loss`, or leave it out",
            )
        if message["role"] == "assistant":
            weights.append(1.0 if loss is None else float(loss))
        elif loss:
            raise RowError(
                f"{where}, message {number}: loss = {loss!r} on a message of the {message['role']}",
                expected="a loss on the assistant's messages only",
                do="leave `loss` out of this message",
            )
    if len(weights) == num_spans:
        return weights
    if len(set(weights)) <= 1:
        return (weights or [1.0])[:1] * num_spans
    raise RowError(
        f"{where}: {len(weights)} assistant messages of unequal loss, rendered as {num_spans} generation blocks",
        expected="one generation block for each assistant message",
        do="give all messages the same `loss`, or choose one of our templates by name",
    )


def _check_keys(message: dict[str, Any], here: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
        raise RowError(
            f"{here}: {message!r:.80}", expected="an object with `role` and `content`", do="mend the message"
        )
    if message["role"] not in ROLES:
        raise RowError(
            f"{here}: role = {message['role']!r}", expected=f"one of {', '.join(ROLES)}", do="rename the role"
        )
    unknown = [key for key, value in message.items() if key not in MESSAGE_KEYS and value is not None]
    if unknown:
        raise RowError(
            f"{here}: unknown key {', '.join(map(repr, unknown))}",
            expected=f"only {', '.join(sorted(MESSAGE_KEYS))}",
            do="rename the key or leave it out",
        )
    if not isinstance(message["content"], str | list | tuple):
        raise RowError(
            f"{here}: content of type {type(message['content']).__name__}",
            expected="a string, or a list of content items",
            do="mend the message's `content`",
        )


def _plain_items(content: Sequence[Any], here: str, kinds: tuple[str, ...]) -> list[dict[str, str]]:
    items: list[dict[str, str]] = []
    for item in content:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind in kinds:
            items.append({"type": kind})
        elif kind == "text" and isinstance(item.get("text"), str):
            if items and items[-1]["type"] == "text":
                items[-1]["text"] += item["text"]
            else:
                items.append({"type": "text", "text": item["text"]})
        else:
            raise RowError(
                f"{here}: a content item {item!r:.80}",
                expected="{'type': 'text', 'text': ...} or " + " or ".join(f"{{'type': {kind!r}}}" for kind in kinds),
                do="mend the item",
            )
    return items


def _rewritten_content(
    content: str | list[dict[str, str]], rewrite: Callable[[str], str]
) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return rewrite(content)
    return [{**item, "text": rewrite(item["text"])} if item["type"] == "text" else item for item in content]
