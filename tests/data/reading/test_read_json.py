"""Streaming JSON: whatever the chunks, the records are those of `json.load`."""

import json
import random
import tracemalloc

import pytest

from mllm.data.importers.base import BadRecord, Record
from mllm.data.reading import json_text
from mllm.data.reading.read_json import read_json

SMALL_CHUNKS = (1, 2, 3, 5, 8, 13, 64, 1000)
LETTERS = ["a", "é", "漢", "😀", '"', "\\", "\n", "{", "}", "[", "]", ",", ":", "<image>", " ", "\u2028"]


def write(tmp_path, content: str | bytes, name="data.json"):
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def split(found):
    """The fields of the records, and the bad records."""
    found = list(found)
    good = [record.fields for record in found if isinstance(record, Record)]
    return good, [record for record in found if isinstance(record, BadRecord)]


def random_value(source: random.Random, depth: int):
    kind = source.choice(["text", "number", "word", "list", "object"][: 5 if depth else 3])
    if kind == "text":
        return "".join(source.choices(LETTERS, k=source.randrange(12)))
    if kind == "number":
        return source.choice([0, -1, 12345678901234567890, 1.5, -2.5e-30, 1e300])
    if kind == "word":
        return source.choice([True, False, None])
    if kind == "list":
        return [random_value(source, depth - 1) for _ in range(source.randrange(4))]
    return {
        f"k{place}{source.choice(LETTERS)}": random_value(source, depth - 1) for place in range(source.randrange(4))
    }


@pytest.mark.parametrize("seed", range(12))
def test_records_are_those_of_json_load_whatever_the_chunk(tmp_path, seed):
    source = random.Random(seed)
    records = [random_value(source, 4) for _ in range(12)]
    for options in ({}, {"ensure_ascii": False}, {"ensure_ascii": False, "indent": 3}):
        path = write(tmp_path, json.dumps(records, **options))
        for chunk in (*SMALL_CHUNKS, 1 << 20):
            found = list(read_json(path, chunk=chunk))
            assert split(found) == (json.loads(path.read_bytes()), [])
            assert [record.number for record in found] == list(range(12))


def test_an_array_is_read_in_memory_that_does_not_grow_with_it(tmp_path):
    record = json.dumps({"id": 1, "text": "word " * 200})
    peaks = []
    for count in (40, 1200):
        path = write(tmp_path, "[" + ", ".join([record] * count) + "]")
        tracemalloc.start()
        assert sum(1 for _ in read_json(path, chunk=1 << 13)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]


def test_ids_of_mixed_types(tmp_path):
    records = [{"id": 1}, {"id": "1"}, {"id": None}, {"id": 1.5}, {}]
    assert split(read_json(write(tmp_path, json.dumps(records)))) == (records, [])


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_json_lines_whatever_the_suffix(tmp_path, name):
    path = write(tmp_path, '\ufeff{"id": 1}\n\n  \n{"id": "é"}\r\n{"id": 3}', name)
    found = list(read_json(path, number=5))
    assert [(record.fields, record.number) for record in found] == [({"id": 1}, 5), ({"id": "é"}, 6), ({"id": 3}, 7)]
    assert [record.where for record in found] == [f"{path}, line {line}" for line in (1, 4, 5)]


def test_an_array_under_the_suffix_of_json_lines(tmp_path):
    assert split(read_json(write(tmp_path, '[\n {"id": 1},\n {"id": 2}\n]', "data.jsonl"))) == (
        [{"id": 1}, {"id": 2}],
        [],
    )
    packed = '[{"id": 1}, {"id": 2}]\n[{"id": 3}]\n'
    assert split(read_json(write(tmp_path, packed, "data.jsonl"))) == ([[{"id": 1}, {"id": 2}], [{"id": 3}]], [])


@pytest.mark.parametrize("chunk", SMALL_CHUNKS)
def test_a_list_in_an_object(tmp_path, chunk):
    text = '{"num_captions_per_audio": 1, "info": {"data": [9]}, "data" : [{"id": "é"}, {"id": 2}], "more": [3]}'
    assert split(read_json(write(tmp_path, text), chunk=chunk)) == ([{"id": "é"}, {"id": 2}], [])


def test_an_object_without_a_list_is_one_record(tmp_path):
    for text in ('{"id": 1,\n "conversations": [1, 2]}', '{"data": {"a": 1}}', "{}"):
        assert split(read_json(write(tmp_path, text))) == ([json.loads(text)], [])


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_bad_utf8_spoils_its_own_record_alone(tmp_path, chunk):
    content = json.dumps([{"id": number, "text": "é" * 9} for number in range(3)], ensure_ascii=False).encode("utf-8")
    place = content.index("é".encode(), content.index(b'"id": 1'))
    good, bad = split(read_json(write(tmp_path, content[:place] + b"\xff" + content[place:]), chunk=chunk))
    assert [record["id"] for record in good] == [0, 2]
    assert [(record.number, record.reason) for record in bad] == [(1, "bytes that are no UTF-8")]
    assert bad[0].where.endswith(f"record 2, byte {place}")


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_half_of_a_surrogate_pair(tmp_path, chunk):
    text = r'[{"a": "\ud83d\ude00"}, {"a": "\ud83d"}, {"a": "\uDE00"}, {"a": 1}]'
    good, bad = split(read_json(write(tmp_path, text), chunk=chunk))
    assert good == [{"a": "😀"}, {"a": 1}]
    assert [record.number for record in bad] == [1, 2] and "surrogate" in bad[0].reason


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("broken", "byte"),
    [
        ('{"id": 1, "text": "he said "hi" twice"}', 28),
        ('{"id": 1, "text": "two\nlines"}', 22),
        ('{"id": 1, "text": }', 18),
        ('{"id": 1, "n": [1, 2,, 3]}', 21),
        ('{"id": 1 "text": 2}', 9),
    ],
)
def test_behind_bad_json_in_an_array_reading_goes_on(tmp_path, chunk, broken, byte):
    first = '[{"id": 0, "turns": [{"from": "x"}, {"from": "y"}]}, '
    last = '{"id": 2, "turns": [{"from": "x"}, {"from": "y"}]}, {"id": 3}]'
    good, bad = split(read_json(write(tmp_path, f"{first}{broken}, {last}"), chunk=chunk))
    assert [record["id"] for record in good] == [0, 2, 3]
    assert len(bad) == 1 and bad[0].number == 1
    assert bad[0].where.endswith(f"record 2, byte {len(first) + byte}")


def test_the_first_record_of_an_array_may_be_the_bad_one(tmp_path):
    good, bad = split(read_json(write(tmp_path, '[{"id": 0, "text": tru}, {"id": 1}, {"id": 2}]')))
    assert (good, len(bad)) == ([{"id": 1}, {"id": 2}], 1)


def test_every_cut_of_an_array_is_noticed(tmp_path):
    records = [{"id": 0, "a": [1, -2.5]}, {"id": 1, "b": "é\n"}]
    whole = json.dumps(records, ensure_ascii=False).encode("utf-8")
    for length in range(1, len(whole)):
        for chunk in (1, 1 << 20):
            good, bad = split(read_json(write(tmp_path, whole[:length]), chunk=chunk))
            assert good == records[: len(good)]
            assert len(bad) == 1, whole[:length]
            assert 1 <= int(bad[0].where.rpartition(" ")[2]) <= length


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b" \n\t ", "the file is empty"),
        (b"\xef\xbb\xbf", "the file is empty"),
        (b"<!DOCTYPE html>", "begins with b'<!DOCTYPE html>'"),
        (b'"text"', "expected a JSON array"),
        (b"[1] [2]", r"behind the end of the array"),
        (b'{"id": 1, "a": ', "Expecting value"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "bad JSON: Exceeds the limit"),
    ],
)
def test_files_that_are_no_array(tmp_path, content, reason):
    _, bad = split(read_json(write(tmp_path, content)))
    assert len(bad) == 1 and reason in bad[0].reason


def test_an_empty_array_and_a_comma_too_many(tmp_path):
    assert split(read_json(write(tmp_path, "[ ]"))) == ([], [])
    assert split(read_json(write(tmp_path, '[{"id": 1},\n]'))) == ([{"id": 1}], [])


def test_one_bad_line_is_one_bad_record(tmp_path):
    lines = [
        b'{"id": 0}',
        b'{"id":,}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b"[" * 100_000,
        b"9" * 5000,
        b'{"id": 6}',
    ]
    path = write(tmp_path, b"\n".join(lines), "data.jsonl")
    good, bad = split(read_json(path))
    assert good == [{"id": 0}, {"id": 6}]
    assert [record.number for record in bad] == [1, 2, 3, 4, 5]
    assert bad[0].where == f"{path}, line 2, byte 16" and bad[1].where == f"{path}, line 3, byte 26"


def test_a_record_without_an_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_text, "MAX_RECORD_LENGTH", 1000)
    good, bad = split(read_json(write(tmp_path, '[{"id": 0}, {"id": "' + "x" * 9000), chunk=100))
    assert (good, len(bad)) == ([{"id": 0}], 1) and "no end of this record within 1,000 letters" in bad[0].reason


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("mllm.data.reading.read_json.MAX_RECORD_LENGTH", 1000)
    path = write(tmp_path, '{"id": 0}\n{"id": "' + "x" * 9000 + '"}\n{"id": 2}\n', "data.jsonl")
    good, bad = split(read_json(path))
    assert good == [{"id": 0}, {"id": 2}]
    assert [(record.number, record.where) for record in bad] == [(1, f"{path}, line 2")]
