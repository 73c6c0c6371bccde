"""LLaMA-Factory: a JSON file of messages, and its entry in the `dataset_info.json` beside it.

Not said: media of one side of a preference, media in an answer of a preference, turns that do not alternate, `loss` of
a message, cuts of files, `<image>`, `<video>`, `<audio>` as words (LLaMA-Factory counts them even where there are no
media). Answers and pairs make two files, so rows of the other kind than the first are not said either. Lost: `source`,
`meta`, `coordinates`, contrast media.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mllm.data.importers.llama_factory import MEDIA
from mllm.data.importers.llama_factory_info import INFO
from mllm.data.importers.placeholders import STRINGS
from mllm.data.schema import PreferenceRow, Row
from mllm.data.writers.media_files import MediaFiles
from mllm.data.writers.outputs import new_file, write_json_array
from mllm.data.writers.report import Report, Unsayable, say_all
from mllm.data.writers.strings import answer_text, check_losses, check_turns, note_lost, text_with_strings
from mllm.errors import OptionError

LITERALS = tuple(STRINGS.values())
SIDE_MEDIA = "media of one side of a preference"
OTHER_KIND = "a row of the other kind (answers and pairs make two files)"


def write_llama_factory(
    rows: Iterable[Row],
    out: Path,
    *,
    name: str,
    media_root: Path | None = None,
    embedded: Path | None = None,
    on_unsayable: str = "error",
) -> Report:
    """Write `NAME.json` into a directory, and the entry NAME into its `dataset_info.json`, beside the others there.

    Args:
        rows: To write; all of them answers, or all of them preferences.
        out: The directory, LLaMA-Factory's `dataset_dir`.
        name: Of the entry and the file.
        media_root: What paths are relative to, LLaMA-Factory's `media_dir`; the directory by default.
        embedded: Where embedded media become files; None to have no words for them.
        on_unsayable: "error", or "skip" to leave out and count what this form cannot say.

    Raises:
        OptionError: There is such a file or entry.
        RowError: A row cannot be said.
    """
    info = out / INFO
    entries = json.loads(info.read_bytes()) if info.is_file() else {}
    if name in entries:
        raise OptionError(f"{info} has an entry {name!r}", expected="a new name", do="remove it, or choose another")
    report = Report()
    sayer = _Sayer(MediaFiles(media_root or out, embedded=embedded), report)
    write_json_array(out / f"{name}.json", say_all(rows, sayer.say, report, on_unsayable=on_unsayable))
    entries[name] = _entry(f"{name}.json", is_ranking=bool(sayer.is_ranking))
    with new_file(info.with_name(f"{INFO}.new")) as partial:
        partial.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    info.with_name(f"{INFO}.new").replace(info)
    report.files += [out / f"{name}.json", info]
    return report


class _Sayer:
    """Says rows of the kind of the first one."""

    def __init__(self, files: MediaFiles, report: Report):
        self.is_ranking: bool | None = None
        self._files, self._report = files, report

    def say(self, row: Row) -> dict[str, Any]:
        """One record."""
        is_ranking = isinstance(row, PreferenceRow)
        if self.is_ranking not in (None, is_ranking):
            raise Unsayable(OTHER_KIND)
        check_losses(row)
        check_turns((message["role"] for message in row.messages), last="user" if is_ranking else "assistant")
        record: dict[str, Any] = {
            "id": row.id,
            "messages": [
                {"role": message["role"], "content": text_with_strings(message["content"], LITERALS)}
                for message in row.messages
            ],
        }
        if isinstance(row, PreferenceRow):
            for side, answer in (("chosen", row.chosen), ("rejected", row.rejected)):
                if answer.media is not None:
                    raise Unsayable(SIDE_MEDIA)
                record[side] = {"role": "assistant", "content": answer_text(answer, LITERALS)}
        # Every record has all columns: LLaMA-Factory reads the file into one table.
        for kind, column in MEDIA.items():
            record[column] = [self._files.path(item) for item in row.media if item.kind == kind]
        self.is_ranking = is_ranking
        note_lost(row, self._report)
        return record


def _entry(file_name: str, *, is_ranking: bool) -> dict[str, Any]:
    sides = {"chosen": "chosen", "rejected": "rejected"} if is_ranking else {}
    return {
        "file_name": file_name,
        "formatting": "sharegpt",
        **({"ranking": True} if is_ranking else {}),
        "columns": {"messages": "messages", **sides, **{column: column for column in MEDIA.values()}},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }
