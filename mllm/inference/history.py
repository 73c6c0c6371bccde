"""What a Gradio chat page remembers, as messages. Pure functions on dicts: Gradio itself is not needed."""

from pathlib import Path
from typing import Any

from mllm.errors import MediaError
from mllm.processing.kinds import media_kind

NO_ANSWER = "No answer"
"""Title that marks a notice of the page, which is no word of the model."""


def messages_from_gradio(message: dict[str, Any], history: list[dict[str, Any]], *, folder: Path) -> list[dict]:
    """Turn the page's history and the user's new message into messages for `Chat`.

    A user's turn that got no answer (stopped at once, or refused with a notice titled `NO_ANSWER`) is left out,
    and the notice with it: one bad file must not spoil every later turn. All text stays text.

    Args:
        message: The new message, {"text": str, "files": [paths]}.
        history: Earlier messages, {"role", "content": parts}, with parts {"type": "text", "text"} and
            {"type": "file", "file": {"path"}}.
        folder: Where the page keeps uploads. History comes back from the browser: no other file is ever opened.

    Raises:
        MediaError: A file lies outside of `folder`, is gone, or holds no picture, sound or video.
    """
    new = [{"type": "file", "file": {"path": path}} for path in message["files"]]
    if message["text"]:
        new.append({"type": "text", "text": message["text"]})
    turns = [*_answered(history), {"role": "user", "content": new}]
    return [
        {"role": turn["role"], "content": [_content_item(part, folder=folder) for part in turn["content"]]}
        for turn in turns
    ]


def _answered(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns that came in pairs of question and answer."""
    kept, question = [], None
    for turn in history:
        if turn["role"] == "user":
            question = turn
        elif question is not None and not _is_notice(turn) and _text(turn):
            kept += [question, turn]
            question = None
    return kept


def _is_notice(turn: dict[str, Any]) -> bool:
    return (turn.get("metadata") or {}).get("title") == NO_ANSWER


def _text(turn: dict[str, Any]) -> str:
    return "".join(part["text"] for part in turn["content"] if part["type"] == "text")


def _content_item(part: dict[str, Any], *, folder: Path) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    path = Path(part["file"]["path"]).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise MediaError(
            "a file that is no longer on the server",
            expected="a file uploaded on this page in the last hours",
            do="start a new chat and upload it again",
        )
    # As bytes: errors then speak of the file without saying where the server keeps it.
    data = path.read_bytes()
    kind = media_kind(data, where=path.name)
    return {"type": kind, kind: data}
