"""An audit finds what is wrong with a source, and nothing that is not."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm.data.auditing.audit import audit_source, kind_of, pattern_of, prefix_of, row_digest, spread
from mllm.data.auditing.audit_findings import audit_table, findings
from mllm.data.auditing.inspection import decode_item
from mllm.data.quarantine import Bad
from mllm.data.schema import parse_row
from mllm.data.sources import Source
from mllm.errors import MediaError
from mllm.load import load_processor
from mllm.processing.images import decode_image


class Rows(list):
    """An index in memory."""

    num_bad = 0
    licence = ""

    def __init__(self, rows, source, bad=()):
        super().__init__(rows)
        self.source, self._bad, self.dropped = source, list(bad), Counter()
        self.num_bad = len({entry.where for entry in self._bad})

    def bad(self):
        return self._bad


@pytest.fixture
def root(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "coco" / "train").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "coco" / "train" / "a.png")
    Image.fromarray(pixels).save(tmp_path / "coco" / "gif.jpg", "GIF")
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "coco" / "cmyk.jpg")
    Image.fromarray(np.zeros((5, 200, 3), np.uint8)).save(tmp_path / "coco" / "wide.png")
    whole = (tmp_path / "coco" / "train" / "a.png").read_bytes()
    (tmp_path / "coco" / "cut.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def row(root: Path, number: int, path: str | None = None, *, words: str = "A kite.", size=(40, 30), **more):
    item = {"kind": "image", "path": path, "height": size[0], "width": size[1]}
    content = [*([{"type": "image"}] if path else []), {"type": "text", "text": f"What is number {number}?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": words}]
    fields = {"id": number, "messages": messages, "media": [item] if path else [], **more}
    return parse_row(fields, where=f"rows.jsonl, line {number}", root=root)


def source(root: Path, **more) -> Source:
    return Source(path=root / "rows.jsonl", **more)


def prefixes(audit) -> dict:
    return {media.prefix: media for media in audit.media}


def test_media_are_counted_by_prefix(root):
    names = ["coco/train/a.png", "coco/train/a.png", "coco/gif.jpg", "coco/cmyk.jpg"]
    rows = [row(root, number, name) for number, name in enumerate(names)] + [row(root, 9)]
    rows.append(row(root, 5, "coco/wide.png", size=(5, 200)))
    audit = audit_source(Rows(rows, source(root)))
    found = prefixes(audit)
    assert (found["coco/train"].items, found["coco/train"].files) == (2, 1)
    assert (found["coco"].items, found["coco"].files) == (3, 3)
    assert not found["coco/train"].notes and not found["coco"].refused
    notes = {note: tally.count for note, tally in found["coco"].notes.items()}
    assert notes == {"gif named .jpg": 1, "CMYK": 1, "extreme aspect": 1, "palette": 1}  # GIFs have one
    assert audit.looked_at == audit.rows == 6


def test_files_that_end_too_early_are_found_by_decoding_alone(root):
    rows = Rows(
        [row(root, 1, "coco/cut.png"), row(root, 2, "coco/cut.png"), row(root, 3, "coco/gif.jpg")], source(root)
    )
    assert not prefixes(audit_source(rows))["coco"].refused
    decoded = audit_source(rows, decode=decode_item)
    ((kind, tally),) = prefixes(decoded)["coco"].refused.items()
    assert (kind, tally.count) == ("truncated or damaged", 1)
    assert "row '1'" in tally.examples[0] and decoded.decoded


def test_the_quarantine_list_is_sorted_by_kind_and_prefix(root):
    bad = [
        Bad("1", "a.json, record 1", "sam/images/1.jpg", "the image '/x/sam/images/1.jpg' does not exist"),
        Bad("2", "a.json, record 2", "sam/images/2.jpg", "the image '/x/sam/images/2.jpg' does not exist"),
        Bad("3", "a.json, record 3", "sam/images/2.jpg", "the image '/x/sam/images/2.jpg' does not exist"),
        Bad("4", "a.json, record 4", "coco/x.jpg", "the image 'coco/x.jpg' is empty"),
        Bad("5", "a.json, record 5", "", "messages = 3, expected a list"),
        Bad("6", "a.json, record 6", "", "messages = 4, expected a list"),
    ]
    audit = audit_source(Rows([row(root, 9)], source(root), bad))
    found = prefixes(audit)
    assert {kind: tally.count for kind, tally in found["sam/images"].refused.items()} == {"missing": 2}
    assert {kind: tally.count for kind, tally in found["coco"].refused.items()} == {"empty": 1}
    assert {reason: tally.count for reason, tally in audit.bad.items()} == {"messages = N, expected a list": 2}
    levels = Counter(finding.level for finding in findings([audit]))
    assert "\x1b" not in audit_table([audit_source(Rows([], source(root), [Bad("7", "x", "", "an \x1b[31m escape")]))])
    assert levels["bad"] == 4 and audit.bad_rows == 6
    assert "sam/images" in audit_table([audit]) and "record 1" in audit_table([audit])


def test_duplicates_within_and_across_sources(root):
    first = [row(root, 1, "coco/gif.jpg"), row(root, 1, "coco/gif.jpg"), row(root, 2, "coco/gif.jpg")]
    seen: set[bytes] = set()
    audit = audit_source(Rows(first, source(root)), seen=seen)
    assert (audit.same_id.count, audit.same_row.count) == (1, 1)
    other = audit_source(Rows([first[2], row(root, 3, "coco/gif.jpg")], source(root)), seen=seen)
    assert (other.same_id.count, other.same_row.count) == (0, 1)


def test_a_digest_is_of_what_is_said_and_seen(root):
    base = row(root, 1, "coco/gif.jpg")
    assert row_digest(base) == row_digest(row(root, 1, "coco/gif.jpg", source="elsewhere", meta={"a": 1}))
    others = [row(root, 1, "coco/cmyk.jpg"), row(root, 1, "coco/gif.jpg", words="A dog."), row(root, 1)]
    assert len({row_digest(one) for one in [base, *others]}) == 4


def test_tokens_lengths_and_what_the_limit_costs(root, assembled):
    processor = load_processor(assembled)
    long = " and a 7" * 60
    rows = [row(root, 1, "coco/gif.jpg"), row(root, 2, words="."), row(root, 3, words=long)]
    unlearned = row(root, 4)
    unlearned.messages[1]["loss"] = 0.0
    sound = {"kind": "audio", "path": "a.wav"}
    heard = [{"role": "user", "content": [{"type": "audio"}]}, {"role": "assistant", "content": "A bell."}]
    rows += [unlearned, parse_row({"id": 5, "messages": heard, "media": [sound]}, where="x", root=root)]
    rows[4].media[0]  # a sound, which this processor cannot read
    (root / "a.wav").write_bytes(b"")
    audit = audit_source(Rows(rows[:4], source(root)), processor=processor, max_length=100)
    tokens = audit.tokens
    assert tokens.nothing_learned.count == 1 and "row '4'" in tokens.nothing_learned.examples[0]
    assert tokens.overlong.count == 1 and tokens.overlong_learned > 100 and tokens.overlong_media == 0
    lengths = sorted(len(processor.encode_chat(one.messages, media_sizes=[(40, 30)] * len(one.media)).input_ids)
                     for one in rows[:4])  # fmt: skip
    assert (tokens.lengths[0], tokens.lengths[3], tokens.total) == (lengths[0], lengths[3], sum(lengths))
    refused = audit_source(Rows(rows[4:], source(root)), processor=processor)
    ((reason, tally),) = refused.tokens.not_encoded.items()
    assert "audio" in reason and tally.count == 1
    assert audit_source(Rows(rows[:4], source(root))).tokens is None


def test_boxes_that_the_crop_cuts_off_are_named(root, assembled):
    processor = load_processor(assembled)
    processor.image_geometry = "crop"
    rows = [row(root, 1, "coco/gif.jpg", words="[0, 0, 30, 2]", coordinates="pixel")]
    audit = audit_source(Rows(rows, source(root)), processor=processor)
    assert list(audit.tokens.not_encoded) == ["a box is cropped away"] and audit.coordinates == 1


def test_a_clean_source_has_nothing_to_complain_about(root):
    rows = Rows([row(root, 1, "coco/train/a.png"), row(root, 2)], source(root))
    rows.licence = "CC BY 4.0"
    audit = audit_source(rows)
    assert findings([audit]) == [] and "Nothing to complain about" in audit_table([audit])
    rows.licence = ""
    assert [finding.what for finding in findings([audit_source(rows)])] == ["no licence stated"]


def test_an_audit_is_json(root):
    rows = Rows([row(root, 1, "coco/gif.jpg")], source(root), [Bad("\ud800", "x", "", "bad \ud800")])
    audit = audit_source(rows)
    assert json.loads(json.dumps(asdict(audit)))["media"][0]["prefix"] == "coco"


def test_names_of_reasons_prefixes_and_samples():
    assert pattern_of("id = 'a \"b' is 3 of 4.5\nmore") == "id = '…' is N of N"
    assert prefix_of("coco/train2017/x/1.jpg", "/data") == "coco/train2017"
    assert prefix_of("/data/coco/1.jpg", "/data") == "coco" and prefix_of("1.jpg", "/data") == "(no directory)"
    assert prefix_of("/other/a/b/1.jpg", "/data") == "/other/a"
    assert list(spread(5, None)) == list(spread(5, 9)) == [0, 1, 2, 3, 4]
    assert list(spread(101, 3)) == [0, 50, 100]


def test_every_error_of_the_image_reader_has_a_kind(root):
    (root / "empty.png").write_bytes(b"")
    (root / "page.jpg").write_bytes(b"<html>404</html>")
    for name, kind in (("none.png", "missing"), (".", "no regular file"), ("empty.png", "empty"),
                       ("page.jpg", "not what the name says"), ("coco/cut.png", "truncated or damaged")):  # fmt: skip
        with pytest.raises(MediaError) as error:
            decode_image(root / name)
        assert kind_of(error.value.found) == kind
