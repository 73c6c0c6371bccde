"""Lengths of rows and contents of batches, against values worked out by hand."""

from pathlib import Path

import numpy as np
import pytest

from mllm.data.auditing.render import encode_sides
from mllm.data.auditing.statistics import BatchSize, RowSize, Statistics, batch_of, row_size
from mllm.data.schema import parse_row
from mllm.load import load_processor


def row(**changes):
    image = {"kind": "image", "path": "a.png", "height": 30, "width": 40}
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    fields = {
        "id": 1,
        "messages": [question, {"role": "assistant", "content": "A red kite, I think."}],
        "media": [image],
    }
    return parse_row(fields | changes, where="x", root=Path("."))


def test_a_batch_is_padded_to_its_longest_row():
    sizes = [RowSize("a", 0, 1, 2, 0, 0), RowSize("b", 0, 1, 1, 3, 1), RowSize("a", 0, 1, 0, 0, 0)]
    assert [size.length for size in sizes] == [3, 5, 1]
    assert batch_of(sizes) == BatchSize(learned=3, read=3, media=3, padding=3 * 5 - 9, sources={"a": 2, "b": 1})
    assert batch_of([]) == BatchSize(0, 0, 0, 0, {})


def test_words_are_counted_where_nobody_knows_the_tokens():
    assert row_size(row(), "a") == RowSize("a", words=8, learned=5, read=3, media=0, num_media=1)
    quiet = row()
    quiet.messages[1]["loss"] = False
    assert row_size(quiet, "a") == RowSize("a", words=8, learned=0, read=8, media=0, num_media=1)


def test_tokens_are_those_that_are_encoded(assembled):
    processor = load_processor(assembled)
    size, (chat,) = row_size(row(), "a", processor), encode_sides(row(), processor)
    assert size.length == len(chat.input_ids) and size.media == sum(span.length for span in chat.media)
    assert size.learned == int(np.count_nonzero(chat.loss_weights)) and size.words == 8
    pair = row(messages=row().messages[:1], chosen={"content": "A kite."}, rejected={"content": "A dog."})
    assert row_size(pair, "a", processor).length == sum(len(chat.input_ids) for chat in encode_sides(pair, processor))


def test_what_the_processor_refuses_has_no_size(assembled):
    sound = [{"kind": "audio", "path": "a.wav"}]
    heard = [{"role": "user", "content": [{"type": "audio"}]}, {"role": "assistant", "content": "A bell."}]
    assert row_size(row(messages=heard, media=sound), "a", load_processor(assembled)) is None


def test_a_summary_is_by_source():
    sizes = [RowSize("a", 10, 1, number - 1, 0, 1) for number in range(1, 101)] + [RowSize("b", 5, 2, 2, 4, 2)]
    first, second = Statistics("tokens", 500, sizes, [], 1, 0).summary()["sources"]
    assert first["lengths"] == {
        "min": 1,
        "median": pytest.approx(50, abs=1),
        "p95": pytest.approx(95, abs=1),
        "max": 100,
    }
    assert (first["rows"], first["media_items"], first["words"]) == (100, 100, 1000)
    assert (second["learned_share"], second["media_share"], second["media_items"]) == (0.25, 0.5, 2)
