"""LLaVA's JSON: `conversations`, and `image` or `video` beside them.

Not said: preferences, sound, images beside videos, media outside the user's turns, turns that do not alternate, `loss`
of a message, cuts of files, a turn's only image behind words (LLaVA shows it in front), and `<image>` or `<video>` as
words in a row with media. Lost: `source`, `meta`, `coordinates`, blanks around the words of a turn with one image.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mllm.data.schema import PreferenceRow, Row
from mllm.data.writers.media_files import MediaFiles
from mllm.data.writers.outputs import write_json_array
from mllm.data.writers.report import Report, Unsayable, say_all
from mllm.data.writers.strings import check_losses, check_turns, note_lost, text_with_strings

NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
BLANKS = "blanks around the words of a turn"


def write_llava(
    rows: Iterable[Row],
    out: Path,
    *,
    media_root: Path | None = None,
    embedded: Path | None = None,
    on_unsayable: str = "error",
) -> Report:
    """Write one JSON file.

    Args:
        rows: To write.
        out: The file; it must not exist.
        media_root: What paths are relative to; the file's directory by default.
        embedded: Where embedded media become files; None to have no words for them.
        on_unsayable: "error", or "skip" to leave out and count what this form cannot say.

    Raises:
        OptionError: The file exists.
        RowError: A row cannot be said.
    """
    report, files = Report(), MediaFiles(media_root or out.parent, embedded=embedded)
    said = say_all(rows, lambda row: _say(row, report, files), report, on_unsayable=on_unsayable)
    write_json_array(out, said)
    report.files.append(out)
    return report


def _say(row: Row, report: Report, files: MediaFiles) -> dict[str, Any]:
    if isinstance(row, PreferenceRow):
        raise Unsayable("a preference")
    kinds = {item.kind for item in row.media}
    if len(kinds) > 1 or "audio" in kinds:
        raise Unsayable("audio" if "audio" in kinds else "images and videos in one row")
    check_losses(row)
    check_turns((message["role"] for message in row.messages), last=row.messages[-1]["role"])
    turns = [
        {"from": NAMES[message["role"]], "value": _value(message, bool(kinds), report)} for message in row.messages
    ]
    paths = [files.path(item) for item in row.media]
    note_lost(row, report)
    media = {kind: paths[0] if len(paths) == 1 else paths for kind in kinds}
    return {"id": row.id, **media, "conversations": turns}


def _value(message: dict[str, Any], has_media: bool, report: Report) -> str:
    content = message["content"]
    text = text_with_strings(content, ("<image>", "<video>") if has_media else (), behind="\n")
    shown = [] if isinstance(content, str) else [item["type"] != "text" for item in content]
    if not any(shown):
        return text
    if message["role"] != "user":
        raise Unsayable(f"media in a message of the {message['role']}")
    if sum(shown) > 1:
        return text
    if not shown[0]:
        raise Unsayable("the only medium of a turn behind words")
    string, _, words = text.partition("\n")
    if words != words.strip():
        report.lost[BLANKS] += 1
    return f"{string}\n{words.strip()}"
