"""A directory of bad things: some 250 rows and files that must end in a quarantine list, and good ones beside them.

`build(root)` writes it and says what has to be found. Deterministic, no downloads, a second of work. To look at it:

    python tests/data/bad_corpus.py DIRECTORY
"""

import io
import json
import sys
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))
from bad_media import FOUND_BY_DECODING, ODD_BUT_GOOD, PUZZLES, encoded, picture, write_media

DEEP = 100_000


@dataclass(frozen=True)
class Expected:
    """One entry of the quarantine list.

    Args:
        place: What must stand in the entry's id, `where` or file, as a whole word.
        reason: A regular expression that its reason must match, whatever the case of letters.
        about: What is wrong, for whoever reads a failing test.
    """

    place: str
    reason: str
    about: str


@dataclass
class Part:
    """A source, and what an index of it must hold.

    Args:
        name: Of the part.
        options: Of its `Source`.
        bad: Rows and files to be named.
        good: Ids of the rows that remain.
        either: Places that may be read or refused: nobody can say what they mean, only that they must do no harm.
    """

    name: str
    options: dict[str, Any]
    bad: list[Expected] = field(default_factory=list)
    good: list[str] = field(default_factory=list)
    either: list[str] = field(default_factory=list)


def build(root: Path) -> list[Part]:
    """Write the whole corpus under `root`, an empty directory."""
    media = root / "media"
    write_media(media)
    return [
        _lines(root, "rows", _row_cases(), format="mllm", media_root=media),
        _lines(root, "text", _text_cases(), format="mllm", media_root=media),
        _lines(root, "media", _media_cases(), format="mllm", media_root=media),
        _lines(root, "preference", _preference_cases(), format="mllm", media_root=media),
        _lines(root, "llava", _llava_cases(), format="llava", media_root=media),
        _lines(root, "messages", _conversational_cases(), format="conversational", media_root=media),
        _marked(root, media),
        _arrays(root, media),
        _tables(root),
        _archives(root),
    ]


# Rows, one a line. A case is what is wrong, what the reason must say ("" for a good row, "?" for either), and the row:
# an object, or the bytes of the line.

Case = tuple[str, str, Any]


def row(**changes: Any) -> dict[str, Any]:
    """A good row with changes; a key whose value is `...` is left out."""
    fields = {"id": "x", "messages": [user("What is it?"), assistant("A kite.")], **changes}
    return {key: value for key, value in fields.items() if value is not ...}


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def about(*media: Any, items: Iterable[str] | None = None) -> dict[str, Any]:
    """A row with these media, and a content item for each unless `items` says otherwise."""
    kinds = [item.get("kind") if isinstance(item, dict) else "image" for item in media] if items is None else items
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": "What is it?"}]
    return row(messages=[user(content), assistant("A kite.")], media=list(media))


def image(path: Any = "good.png", **more: Any) -> dict[str, Any]:
    return {"kind": "image", "path": path, **more}


def _row_cases() -> list[Case]:
    talk = "messages|message|content|role"
    return [
        ("a good row", "", row()),
        *(
            (f"the line is {value!r:.20}", "an? (str|list|int|float|bool|NoneType)|object", value)
            for value in ("words", [1, 2], 3, 1.5, True, None, [])
        ),
        ("an empty object", "id|messages|form", {}),
        *((f"id = {value!r}", "id", row(id=value)) for value in ([], {}, 1.5)),
        ("no id", "", row(id=...)),
        ("id = null is no id", "", row(id=None)),
        ("id is a number", "", row(id=7)),
        ("no messages", talk, row(messages=...)),
        *(
            (f"messages = {value!r}", talk, row(messages=value))
            for value in (None, "", "words", {}, [], 3, True, [None], [1], ["x"], [[]], [{}])
        ),
        *(
            (f"a message {value!r}", talk, row(messages=[value, assistant("A kite.")]))
            for value in (
                {"role": "user"},
                {"content": "What?"},
                {"role": None, "content": "What?"},
                {"role": 3, "content": "What?"},
                {"role": [], "content": "What?"},
                {"role": {}, "content": "What?"},
                {"role": "gpt", "content": "What?"},
                {"role": "User", "content": "What?"},
            )
        ),
        *(
            (f"content = {value!r}", "content|text|item|type", row(messages=[user(value), assistant("A kite.")]))
            for value in (
                *(None, 3, True, {}, {"type": "text"}, [1], [None], ["x"], [[]], [{}]),
                [{"text": "no type"}],
                [{"type": "text"}],
                [{"type": "text", "text": None}],
                [{"type": "text", "text": 3}],
                [{"type": "text", "text": ["x"]}],
                [{"type": "hologram"}],
                [{"type": None}],
                [{"type": []}],
                [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}],
            )
        ),
        ("nobody answers", "assistant", row(messages=[user("What is it?")])),
        ("the only answer is not learned", "assistant", row(messages=[user("?"), assistant("A kite.", loss=False)])),
        ("a system message alone", "assistant", row(messages=[{"role": "system", "content": "Be kind."}])),
        *(
            (f"loss = {value!r}", "loss", row(messages=[user("?"), assistant("A kite.", loss=value)]))
            for value in ("yes", -1, [], float("nan"), float("inf"))
        ),
        ("a loss on the question", "loss", row(messages=[user("?", loss=True), assistant("A kite.")])),
        ("an unknown key of a message", "key|author", row(messages=[user("?", author="me"), assistant("A kite.")])),
        ("an unknown key", "key|colour", row(colour="red")),
        ("unknown coordinates", "coordinates", row(coordinates="inches")),
        ("coordinates = 3", "coordinates", row(coordinates=3)),
        ("meta is no object", "meta", row(meta="words")),
        ("source is no word", "source", row(source=["a"])),
        ("a literal placeholder without media is text", "", row(messages=[user("<image> ?"), assistant("No.")])),
        ("empty words", "", row(messages=[user(""), assistant("A kite.")])),
        ("two weights", "", row(messages=[user("?"), assistant("A kite.", loss=0.5), user("?"), assistant("Two.")])),
        # Placeholders against media
        ("a placeholder without a medium", "media", about(items=["image"])),
        ("two placeholders, one medium", "media", about(image(), items=["image", "image"])),
        ("a medium without a placeholder", "media", about(image(), items=[])),
        ("two media, one placeholder", "media", about(image(), image(), items=["image"])),
        ("another kind", "media", about(image(), items=["audio"])),
        ("another order", "media", about(image(), {"kind": "audio", "path": "good.wav"}, items=["audio", "image"])),
        # The list of media
        *((f"media = {value!r}", "media", row(media=value)) for value in ("good.png", {"kind": "image"}, 3, True)),
        *(
            (f"a media item {value!r:.60}", "media|kind|path|key|blob|file name", about(value, items=["image"]))
            for value in (
                *(None, 3, "good.png", [], {}),
                {"path": "good.png"},
                {"kind": "hologram", "path": "good.png"},
                {"kind": None, "path": "good.png"},
                {"kind": [], "path": "good.png"},
                {"kind": "image"},
                image(None),
                image(""),
                image(3),
                image(["good.png"]),
                image({"path": "good.png"}),
                image(True),
                image(colour="red"),
                image("x" * 5000),
                image("\0.png"),
                image("x/" * 3000),
                {"kind": "image", "blob": "words"},
                {"kind": "image", "blob": {}},
                {"kind": "image", "blob": {"container": "/etc/passwd", "offset": 0, "length": 9}},
                {"kind": "image", "blob": {"container": "good.png", "colour": 1}},
                {"kind": "image", "blob": {"container": 3}},
            )
        ),
        *(
            (f"{key} = {value!r}", key, about(image(**{"height": 40, "width": 30, key: value})))
            for key in ("height", "width")
            for value in (0, -1, 1.5, "30", True, [])
        ),
        ("a height and no width", "height|width", about(image(height=40))),
        ("a size that is not the file's", "40|30", about(image(height=41, width=30))),
        *(
            (f"{key} = {value!r}", key, about({"kind": "audio", "path": "good.wav", key: value}))
            for key in ("start", "end")
            for value in (-1, "0", float("nan"), float("inf"), True)
        ),
        ("it ends before it starts", "start|end", about({"kind": "audio", "path": "good.wav", "start": 2, "end": 1})),
        ("a good picture", "", about(image())),
        ("a good sound", "", about({"kind": "audio", "path": "good.wav"})),
    ]


def _text_cases() -> list[Case]:
    """Lines that are no JSON, or JSON that would hurt."""
    good = json.dumps(row()).encode()
    broken = "JSON|UTF-8|utf-8|character|unexpected|expect|invalid|deep|nest|recursion|surrogate|depth"
    lines = (
        *(b"{", b"}", b'{"id": 1,}', b"{'id': 1}", b"nul", b"words", b'{"id": 1} {"id": 2}', good[:-1], good[1:]),
        *(b"\xff\xfe", good.replace(b"kite", b"\xff\xfe"), good.replace(b"kite", b"\xc0\xaf")),
        *(good.replace(b"kite", b"\xed\xa0\x80"), good.replace(b"kite", b"ki\0te"), good.replace(b"kite", b"ki\tte")),
        *(good.replace(b"kite", rb"\ud800"), good.replace(b"kite", rb"\x41"), b"\0\0\0\0", b"\x1f\x8b\x08\0"),
        *(good.decode().encode("utf-16-le").replace(b"\n", b""), b"<html><body>404</body></html>", b"# a remark"),
        *(b"[" * DEEP, b'{"a":' * DEEP, b"[" * DEEP + b"]" * DEEP),
        good[:-1] + b', "meta": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
        *(b"NaN", b"-Infinity", good.replace(b'"x"', b"NaN"), good.replace(b'"x"', b"0x10")),
    )
    harmless = [
        ("the same key twice", "?", good[:-1] + b', "id": "y"}'),
        ("a number of 400 digits", "?", good[:-1] + b', "meta": {"n": 1' + b"0" * 400 + b"}}"),
        ("a number beyond all floats", "?", good[:-1] + b', "meta": {"n": 1e999}}'),
        ("a NUL escape", "?", good.replace(b"kite", rb"ki\u0000te")),
        ("an id of 400 digits", "?", good.replace(b'"x"', b"1" * 400)),
        ("nested 200 deep", "?", good[:-1] + b', "meta": {"m": ' + b"[" * 200 + b"]" * 200 + b"}}"),
    ]
    fine = [
        ("blanks around it", "", b"  " + good + b"\t "),
        ("separators of lines within a text", "", good.replace(b"kite", "ki\u2028t\u0085e".encode())),
        ("an emoji as two escapes", "", good.replace(b"kite", rb"\ud83e\ude81")),
        (
            "right to left, combined, and far from ASCII",
            "",
            good.replace(b"kite", "مرحبا e\u0301 \U0010fffd".encode()),
        ),
        ("a text of a million letters", "", good.replace(b"kite", b"kite " * 200_000)),
    ]
    return [*((f"the line {line[:30]!r}", broken, line) for line in lines), *harmless, *fine]


def _media_cases() -> list[Case]:
    outside = "outside|leaves|media_root|not exist|no image"
    paths = {
        "../outside.png": "outside|leaves|media_root",
        "./../media/../outside.png": "outside|leaves|media_root",
        "x/../../outside.png": "outside|leaves|media_root|not exist",
        "../../../../../../../../../etc/passwd": outside,
        "/etc/passwd": outside,
        "/dev/zero": outside + "|device|regular",
        "/proc/self/mem": outside + "|regular|read",
        "~/good.png": "not exist",
        "file:///etc/passwd": "not exist|URL|scheme|outside",
        "https://example.org/a.png": "not exist|URL|scheme|http|outside",
        "data:image/png;base64,AAAA": "not exist|data:|no image|URL|damaged",
        "images\\good.png": "not exist",
        ".": "directory|outside",
        "..": "directory|outside|leaves",
        "GOOD.PNG.": "not exist",
        "good.png\n": "not exist",
        "*.png": "not exist",
        "$HOME/good.png": "not exist",
        "good.png; rm -rf x": "not exist",
        "-rf": "not exist",
    }
    return [
        *((f"the path {path!r}", reason, about(image(path))) for path, reason in paths.items()),
        *((name, reason, about({"kind": kind, "path": name})) for name, (kind, reason) in PUZZLES.items()),
        ("a picture as a sound", "no audio|sound|damaged|cannot", about({"kind": "audio", "path": "good.png"})),
        ("a sound as a video", "no video|damaged|cannot|not a video", about({"kind": "video", "path": "good.wav"})),
        ("two of three are bad", "no image|empty", about(image(), image("empty.png"), image("page.jpg"))),
        *((name, "", about(image(name))) for name in ODD_BUT_GOOD),
        ("a path that comes back", "", about(image("../media/good.png"))),
        ("a slash behind the name", "", about(image("good.png/"))),
        *((name, "", about(image(name))) for name in FOUND_BY_DECODING),
    ]


def _preference_cases() -> list[Case]:
    def pair(**changes: Any) -> dict[str, Any]:
        question = [user([{"type": "image"}, {"type": "text", "text": "What is it?"}])]
        sides = {"chosen": {"content": "A kite."}, "rejected": {"content": "A dog."}}
        return row(**{"messages": question, "media": [image()], **sides, **changes})

    return [
        ("a good pair", "", pair()),
        (
            "its rejected side has its own image",
            "",
            pair(rejected={"content": "A.", "media": [image("gif_named.jpg")]}),
        ),
        ("contrast", "", pair(contrast=[image("cmyk.jpg")])),
        ("no rejected side", "rejected", pair(rejected=...)),
        ("no chosen side", "chosen", pair(chosen=...)),
        *((f"chosen = {value!r}", "chosen", pair(chosen=value)) for value in ("A kite.", [], {}, 3, True)),
        *(
            (f"the content of rejected = {value!r}", "rejected|content|text", pair(rejected={"content": value}))
            for value in (None, 3, {}, [1], [{"text": "no type"}], [{"type": "text"}])
        ),
        ("an unknown key of a side", "key|score", pair(chosen={"content": "A kite.", "score": 3})),
        ("too few media on a side", "media", pair(rejected={"content": "A dog.", "media": []})),
        ("too many media on a side", "media", pair(rejected={"content": "A dog.", "media": [image(), image()]})),
        ("another kind on a side", "media", pair(contrast=[{"kind": "audio", "path": "good.wav"}])),
        (
            "a missing file on a side",
            "not exist",
            pair(rejected={"content": "A dog.", "media": [image("absent.png")]}),
        ),
        ("a missing file as contrast", "not exist", pair(contrast=[image("absent.png")])),
        ("contrast without a pair", "contrast", row(contrast=[image()])),
        ("contrast is a word", "contrast|media", pair(contrast="good.png")),
    ]


def _llava_cases() -> list[Case]:
    def talk(*turns: Any, **more: Any) -> dict[str, Any]:
        return {"id": "x", "conversations": list(turns), **more}

    asks, says = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A kite."}
    plain = {"from": "human", "value": "What?"}
    form = "conversations|from|value|turn|message|human|gpt|role|form"
    return [
        ("a good row", "", talk(asks, says, image="good.png")),
        ("text only", "", talk(plain, says)),
        ("two images", "", talk({"from": "human", "value": "<image><image> Which?"}, says, image=["good.png"] * 2)),
        ("a literal placeholder", "", talk({"from": "human", "value": "What does <image> mean?"}, says)),
        ("no conversations", form, {"id": "x", "image": "good.png"}),
        *(
            (f"conversations = {value!r}", form, {"id": "x", "conversations": value})
            for value in (None, "words", {}, 3, [], [None], [1], [[]], [{}], ["x"])
        ),
        *(
            (f"a turn {turn!r}", form, talk(turn, says))
            for turn in (
                {"from": "human"},
                {"value": "What?"},
                {"from": None, "value": "What?"},
                {"from": 3, "value": "What?"},
                {"from": "martian", "value": "What?"},
                {"from": "human", "value": None},
                {"from": "human", "value": 3},
                {"from": "human", "value": ["What?"]},
            )
        ),
        ("nobody answers", form + "|assistant", talk(plain)),
        (
            "more placeholders than images",
            "image|placeholder|media",
            talk(asks, asks | says, asks, says, image="good.png"),
        ),
        ("more images than placeholders", "image|placeholder|media", talk(asks, says, image=["good.png", "good.png"])),
        *(
            (f"image = {value!r}", "image", talk(asks, says, image=value))
            for value in (3, True, {"x": 1}, [3], [None], [["good.png"]])
        ),
        ("image is an empty text", "?", talk(asks, says, image="")),
        ("a missing image", "not exist", talk(asks, says, image="coco/train2017/000000000001.jpg")),
        ("HTML for an image", "no image|HTML", talk(asks, says, image="page.jpg")),
        ("a path that leaves", "outside|leaves|media_root", talk(asks, says, image="../outside.png")),
    ]


def _conversational_cases() -> list[Case]:
    ask = user([{"type": "image"}, {"type": "text", "text": "What?"}])
    return [
        ("a good row", "", {"messages": [ask, assistant("A kite.")], "images": ["good.png"]}),
        ("no images for the placeholder", "image|media", {"messages": [ask, assistant("A kite.")], "images": []}),
        ("images = null", "image|media", {"messages": [ask, assistant("A kite.")], "images": None}),
        ("images = 3", "image|media", {"messages": [ask, assistant("A kite.")], "images": 3}),
        ("images = [3]", "image|media|path", {"messages": [ask, assistant("A kite.")], "images": [3]}),
        ("an image too many", "image|media", {"messages": [ask, assistant("A kite.")], "images": ["good.png"] * 2}),
        ("messages = null", "messages|form", {"messages": None, "images": []}),
        ("messages = {}", "messages|form", {"messages": {}, "images": []}),
        ("a message without a role", "role|message", {"messages": [{"content": "x"}, assistant("y")], "images": []}),
        ("no answer", "assistant", {"messages": [user("What?")], "images": []}),
    ]


def _lines(root: Path, name: str, cases: list[Case], **options: Any) -> Part:
    path = root / f"{name}.jsonl"
    part = Part(name, {"path": path, **options})
    with path.open("wb") as file:
        for number, (what, reason, value) in enumerate(cases, start=1):
            if isinstance(value, dict) and value.get("id") == "x":
                value = {**value, "id": f"{name}-{number}"}
            line = value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()
            file.write(line.replace(b'"id": "x"', f'"id": "{name}-{number}"'.encode()) + b"\n")
            _enter(part, f"line {number}", reason, what)
    return part


def _enter(part: Part, place: str, reason: str, what: str) -> None:
    if reason == "?":
        part.either.append(place)
    elif reason:
        part.bad.append(Expected(place, reason, what))
    else:
        part.good.append(place)


# Files of other kinds


def _marked(root: Path, media: Path) -> Part:
    """Good rows behind a byte order mark, between blank lines, with ends of line as Windows writes them."""
    lines = [json.dumps(row(id=f"marked-{number}")) for number in range(3)]
    path = root / "marked.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode() + b"\r\n \r\n{\r\n" + lines[0].encode())
    bad = [Expected("line 7", "JSON|unexpected|expect|invalid|character", "a brace alone")]
    return Part("marked", {"path": path, "format": "mllm", "media_root": media}, bad, good=["1", "3", "5", "8"])


def _arrays(root: Path, media: Path) -> Part:
    """JSON arrays that end too early, and files that are none: the rest of such a file cannot be read."""
    folder = root / "arrays"
    folder.mkdir()
    rows = [
        {
            "id": f"array-{number}",
            "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "A kite."}],
        }
        for number in range(4)
    ]
    text = json.dumps(rows).encode()
    files = {
        "good.json": (text, 4),
        "cut.json": (text[: text.index(b'"array-2"')], 2),
        "cut_string.json": (text[: text.index(b"kite", text.index(b'"array-2"'))], 2),
        "comma.json": (text.replace(b'}, {"id": "array-2"', b'} {"id": "array-2"'), 3),
        "bad_utf8.json": (text.replace(b'"array-3"', b'"array-\xff"'), 3),
        "empty.json": (b"", 0),
        "blank.json": (b" \n\n ", 0),
        "bracket.json": (b"[", 0),
        "page.json": (b"<html><body>404 Not Found</body></html>", 0),
        "deep.json": (b"[" * DEEP, 0),
        "zeros.json": (bytes(1000), 0),
        "word.json": (b'"words"', 0),
        "pointer.json": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n", 0),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    reason = "JSON|UTF-8|utf-8|empty|expect|unexpected|ends|incomplete|truncated|invalid|no record|array|deep|lexical"
    bad = [Expected(name, reason, f"the file {name}") for name in files if name != "good.json"]
    good = [f"{name}:{number}" for name, (_, count) in files.items() for number in range(count)]
    return Part("arrays", {"path": folder / "*.json", "format": "llava", "media_root": media}, bad, good)


def _tables(root: Path) -> Part:
    """Parquet: files that are none, and cells whose bytes are no image."""
    folder = root / "tables"
    folder.mkdir()
    whole = encoded(picture(), "PNG")
    cells = {
        "cell-good": ("", {"bytes": whole, "path": "a.png"}),
        "cell-gif": ("", {"bytes": encoded(picture(), "GIF"), "path": "a.jpg"}),
        "cell-html": ("no image|HTML|damaged", {"bytes": b"<html>404</html>", "path": "a.png"}),
        "cell-empty": ("empty|image|bytes", {"bytes": b"", "path": "a.png"}),
        "cell-null": ("image|bytes|empty|path", {"bytes": None, "path": None}),
        "cell-none": ("image|media|null|None", None),
        "cell-header": ("no image|damaged", {"bytes": whole[:20], "path": "a.png"}),
    }
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    table = pa.table(
        {
            "id": list(cells),
            "messages": [
                [
                    {"role": "user", "content": parts},
                    {"role": "assistant", "content": [{"type": "text", "text": "A."}]},
                ]
            ]
            * len(cells),
            "images": [[cell] for _, cell in cells.values()],
        }
    )
    pq.write_table(table, folder / "cells.parquet")
    content = (folder / "cells.parquet").read_bytes()
    length = int.from_bytes(content[-8:-4], "little")  # of the footer
    files = {
        "words.parquet": b"just some words\n" * 10,
        "empty.parquet": b"",
        "no_footer.parquet": content[: len(content) // 2],
        "bad_footer.parquet": content[: -8 - length] + bytes(length) + content[-8:],
        "magic.parquet": b"PAR1PAR1",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    bad = [Expected(name, "parquet|Parquet|footer|magic|empty|invalid|file", f"the file {name}") for name in files]
    bad += [Expected(name, reason, name) for name, (reason, _) in cells.items() if reason]
    good = [name for name, (reason, _) in cells.items() if not reason]
    return Part("tables", {"path": folder / "*.parquet", "format": "conversational"}, bad, good)


def _archives(root: Path) -> Part:
    """Tars with members that are no files, with groups that lack a part, and one that ends too early."""
    folder = root / "tars"
    folder.mkdir()
    whole = encoded(picture(), "PNG")
    with tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        _member(tar, "good.png", whole)
        _member(tar, "good.txt", b"A kite.")
        _member(tar, "html.png", b"<html>404</html>")
        _member(tar, "html.txt", b"A kite.")
        _member(tar, "empty.png", b"")
        _member(tar, "empty.txt", b"A kite.")
        _member(tar, "lonely.png", whole)
        _member(tar, "badtext.png", whole)
        _member(tar, "badtext.txt", b"\xff\xfe\xff")
        for name, kind in (("device", tarfile.CHRTYPE), ("pipe", tarfile.FIFOTYPE), ("link", tarfile.SYMTYPE)):
            _member(tar, f"{name}.png", b"", kind=kind, target="/dev/zero")
            _member(tar, f"{name}.txt", b"A kite.")
        _member(tar, "last.png", whole)
        _member(tar, "last.txt", b"A dog.")
    content = (folder / "a.tar").read_bytes()
    (folder / "b.tar").write_bytes(content[:700])
    (folder / "c.tar").write_bytes(b"just some words\n" * 100)
    broken = "image|media|png|empty|damaged|regular|member|device|link|missing"
    bad = [
        Expected("html", "no image|HTML|damaged", "an HTML page as an image"),
        Expected("empty", "empty|image", "an empty image"),
        Expected("lonely", "text|caption|json|txt|missing|no ", "an image without a text"),
        Expected("badtext", "UTF-8|utf-8", "a text that is no UTF-8"),
        *(Expected(name, broken, f"a member that is a {name}") for name in ("device", "pipe", "link")),
        Expected("b.tar", "tar|end|truncated|read|cut", "a tar that ends too early"),
        Expected("c.tar", "tar|header|read", "words named .tar"),
    ]
    return Part("tars", {"path": folder / "*.tar", "format": "webdataset"}, bad, good=["good", "last"])


def _member(tar: tarfile.TarFile, name: str, data: bytes, *, kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, target
    tar.addfile(info, io.BytesIO(data))


def summary(parts: Iterable[Part]) -> str:
    """How much of what there is, for whoever builds the corpus by hand."""
    lines = [f"{part.name:12} {len(part.bad):4} bad {len(part.good):4} good {part.options['path']}" for part in parts]
    return "\n".join(lines)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    where.mkdir(parents=True)
    print(summary(build(where)))
