"""Contents as texts with strings such as `<image>` in them, for the forms that have them."""

from collections.abc import Iterable, Sequence
from typing import Any

from mllm.data.schema import Answer, PreferenceRow, Row
from mllm.data.writers.report import Report, Unsayable


def text_with_strings(content: str | list[dict[str, Any]], literals: Sequence[str], *, behind: str = "") -> str:
    """A content as one text.

    Args:
        content: Of a message.
        literals: What a text must not hold, because the form would take it for a medium.
        behind: Stands behind each medium's string. The importers swallow one newline there, so an empty one becomes a
            newline where the words that follow begin with one.

    Raises:
        Unsayable: A text holds such a string.
    """
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = ""
    for number, item in enumerate(items):
        if item["type"] != "text":
            following = items[number + 1].get("text", "") if number + 1 < len(items) else ""
            text += f"<{item['type']}>" + (behind or ("\n" if following.startswith("\n") else ""))
            continue
        for literal in literals:
            if literal in item["text"]:
                raise Unsayable(f"literal {literal} in a text")
        text += item["text"]
    return text


def answer_text(answer: Answer, literals: Sequence[str]) -> str:
    """The text of one side of a preference.

    Raises:
        Unsayable: It holds more than text.
    """
    if isinstance(answer.content, list) and any(item["type"] != "text" for item in answer.content):
        raise Unsayable("media in an answer of a preference")
    return text_with_strings(answer.content, literals)


def check_turns(roles: Iterable[str], *, last: str) -> None:
    """Check that a form whose users and assistants take turns has words for these.

    Raises:
        Unsayable: They do not.
    """
    spoken = list(roles)
    if spoken[:1] == ["system"]:
        del spoken[0]
    expected = ["user", "assistant"] * len(spoken)
    if not spoken or spoken != expected[: len(spoken)] or spoken[-1] != last:
        raise Unsayable(f"turns that are not user, assistant, ..., {last}")


def check_losses(row: Row) -> None:
    """Check that every message of the assistant is learned with the same weight, as forms without `loss` have it.

    Raises:
        Unsayable: One is not.
    """
    if any(message["role"] == "assistant" and message.get("loss", True) not in (True, 1) for message in row.messages):
        raise Unsayable("a message with a `loss` of its own")


def note_lost(row: Row, report: Report, *, keeps: Sequence[str] = ()) -> None:
    """Count what a form has no place for.

    Args:
        row: A row that is written.
        report: Counts.
        keeps: What this form does have a place for.
    """
    lost = {
        "meta": bool(row.meta),
        "coordinates": bool(row.coordinates),
        "contrast media": isinstance(row, PreferenceRow) and row.contrast is not None,
    }
    report.lost.update(name for name, is_lost in lost.items() if is_lost and name not in keeps)
