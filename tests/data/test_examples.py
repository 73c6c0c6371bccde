import json
from pathlib import Path

import numpy as np
import pytest

from mllm.data import examples as examples_module
from mllm.data.examples import MEASURES, Example, Examples, encode_row
from mllm.data.indexing.token_counts import count_tokens
from mllm.data.labels import IGNORED
from mllm.data.left_out import BAD, LeftOut
from mllm.data.mixture import Mixture
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.errors import OptionError, RowError
from mllm.testing import save_tiny_rows, tiny_model

ASK = {"role": "user", "content": "What is it?"}
ANSWER = {"role": "assistant", "content": "a red 3"}
IMAGE = {"kind": "image", "path": "images/1-0.png"}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("parts"))[1]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return save_tiny_rows(tmp_path_factory.mktemp("rows") / "rows", 6)


@pytest.fixture(scope="module")
def rows(path):
    return _open(path)


def _open(path: Path, **options) -> Mixture:
    return open_mixture(read_mixture([{"path": str(path), **options}]))


def _rows_of(path: Path, name: str, *rows: dict, **options) -> Mixture:
    """Rows as they are given, beside the pictures of `path`."""
    own = path.with_name(name)
    own.write_text("".join(json.dumps({"id": str(n), "media": [], **row}) + "\n" for n, row in enumerate(rows)))
    return _open(own, **options)


def test_an_example_learns_the_answer_and_its_end_of_turn(rows, processor):
    example = encode_row(rows[1], processor)
    learned = example.labels[example.labels != IGNORED]
    assert processor.tokenizer.decode(learned).strip() == "a red 3 and a 7<|im_end|>"
    assert example.loss_weights is None
    spans = example.input_ids == processor.image_token_id
    assert spans.sum() == 4 and (example.labels[spans] == IGNORED).all()


def test_longer_rows_are_dropped_and_counted(rows, processor):
    whole = Examples(rows, processor)
    limit = sorted(whole.lengths.tolist())[3]
    some = Examples(rows, processor, max_length=limit)
    kept = [index for index, length in enumerate(whole.lengths.tolist()) if length <= limit]
    assert some.used.tolist() == kept and len(some) == len(kept) < 6
    assert some.dropped == {"longer than max_length": 6 - len(kept)}
    assert [some[n].row.id for n in range(len(some))] == [rows[n].id for n in kept]
    assert sorted(some.order(0, 0).tolist()) == list(range(len(kept)))


def test_a_longer_row_is_an_error_where_that_is_asked_for(rows, processor):
    with pytest.raises(RowError, match=r"row 'row-0' .* has \d+ tokens"):
        Examples(rows, processor, max_length=10, overlong="error")


def test_no_row_left(rows, processor):
    with pytest.raises(OptionError, match="no row left of 6 .*longer than max_length"):
        Examples(rows, processor, max_length=10)


def test_unknown_policy(rows, processor):
    with pytest.raises(OptionError, match="overlong = 'cut'"):
        Examples(rows, processor, overlong="cut")


def test_what_cannot_be_learned_is_dropped_and_counted_by_reason(path, processor):
    rows = _rows_of(
        path, "reasons.jsonl",
        {"messages": [ASK, ANSWER | {"loss": 0.0}]},
        {"messages": [ASK, ANSWER]},
        {"messages": [ASK, {"role": "assistant", "content": [{"type": "image"}]}], "media": [IMAGE]},
        {"messages": [ASK, {"role": "assistant", "content": [{"type": "image"}], "loss": False}, ASK, ANSWER],
         "media": [IMAGE]},
    )  # fmt: skip
    reasons = {"nothing to learn from": 1, "media in an answer, which the model cannot make": 1}
    examples = Examples(rows, processor)
    assert examples.used.tolist() == [1, 3] and examples.dropped == reasons
    due = Examples(rows, processor, measure="bounded")
    left_out = [due[n] for n in (0, 2)]
    assert len(due) == 4 and [row.reason for row in left_out] == list(reasons)
    assert not any(row.error or row.bad for row in left_out)


def test_media_without_a_tower_are_dropped_by_their_kind(path, processor):
    rows = _open(path)
    text_only = type(processor)(
        processor.tokenizer, chat_template=processor.chat_template, end_of_turn_token="<|im_end|>"
    )
    for measure in MEASURES:
        examples = Examples(rows, text_only, measure=measure)
        assert examples.dropped == {"image, for which the model has no tower": 4}
        assert examples.used.tolist() == [0, 3]


@pytest.mark.parametrize("measure", MEASURES)
def test_preferences_are_no_conversations(path, processor, measure):
    row = {"messages": [ASK], "chosen": {"content": "yes"}, "rejected": {"content": "no"}}
    rows = _rows_of(path, "preference.jsonl", row, on_bad="quarantine")
    with pytest.raises(RowError, match="row '0' .*: a preference"):
        Examples(rows, processor, measure=measure)


def test_weights_travel_where_they_are_uneven(path, processor):
    rows = _rows_of(path, "half.jsonl", {"messages": [ASK, ANSWER | {"loss": 0.5}]})
    half = encode_row(rows[0], processor)
    assert set(half.loss_weights.tolist()) == {0.0, 0.5}
    assert ((half.labels != IGNORED) == (half.loss_weights > 0)).all()


def test_beyond_the_cache_rows_are_encoded_again_to_the_same(rows, processor, monkeypatch):
    cached = Examples(rows, processor)
    monkeypatch.setattr(examples_module, "CACHED_TOKENS", 50)
    again = Examples(rows, processor)
    assert again._cache is None
    _assert_same(cached, again)


def test_a_large_mixture_is_encoded_when_due_to_the_same(rows, processor, monkeypatch):
    small = Examples(rows, processor)
    monkeypatch.setattr(examples_module, "ENCODED_AT_START", 5)
    encoded = []
    monkeypatch.setattr(
        examples_module, "encode_row", lambda row, processor: encoded.append(row.id) or encode_row(row, processor)
    )
    large = Examples(rows, processor)
    assert encoded == ["row-0"]  # the first of its source, to see what it is
    assert (small.measure, large.measure, len(large)) == ("encoded", "bounded", 6)
    _assert_same(small, large)


def test_counts_of_an_earlier_pass_drop_what_encoding_would(rows, processor, monkeypatch):
    whole = Examples(rows, processor)
    limit = sorted(whole.lengths.tolist())[3]
    encoded = Examples(rows, processor, max_length=limit)
    bounded = Examples(rows, processor, max_length=limit, measure="bounded")
    assert 6 - len(encoded) <= bounded.num_unmeasured <= 6 and len(bounded) == 6 and not bounded.dropped
    for index in rows.indexes:
        count_tokens(index, processor)
    monkeypatch.setattr(examples_module, "ENCODED_AT_START", 5)
    counted = Examples(rows, processor, max_length=limit)
    assert counted.measure == "counted" and counted.num_unmeasured == 0
    assert counted.used.tolist() == encoded.used.tolist() and counted.dropped == encoded.dropped
    assert counted.lengths.tolist() == encoded.lengths.tolist()
    with pytest.raises(RowError, match="has .* tokens"):
        Examples(rows, processor, max_length=limit, overlong="error")


def test_a_row_found_too_long_when_due_is_left_out(rows, processor):
    whole = Examples(rows, processor)
    limit = sorted(whole.lengths.tolist())[3]
    large = Examples(rows, processor, max_length=limit, measure="bounded")
    for index, length in enumerate(whole.lengths.tolist()):
        assert isinstance(large[index], Example if length <= limit else LeftOut)
    strict = Examples(rows, processor, max_length=10, overlong="error", measure="bounded")
    with pytest.raises(RowError, match="has .* tokens"):
        strict.account.add(strict[0])


@pytest.mark.parametrize("on_bad", ["error", "quarantine"])
def test_a_row_that_the_template_refuses_is_an_error_or_in_quarantine(path, processor, on_bad):
    twice = {"messages": [ASK, ANSWER, ANSWER]}
    rows = _rows_of(path, "refused.jsonl", *[{"messages": [ASK, ANSWER]}] * 3, twice, on_bad=on_bad, max_bad_rate=0.25)
    template = "{{ raise_exception('twice') if messages | length > 2 }}" + processor.chat_template
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "chat_template", template)
        if on_bad == "error":
            with pytest.raises(RowError, match="row '3' .*refuses"):
                Examples(rows, processor)
            return
        examples = Examples(rows, processor)
    assert examples.used.tolist() == [0, 1, 2] and examples.dropped == {BAD: 1}


def test_progress_counts_every_row(rows, processor):
    seen = []
    Examples(rows, processor, max_length=45, progress=lambda: seen.append(1))
    assert len(seen) == 6


def _assert_same(one: Examples, other: Examples) -> None:
    for index in range(len(one)):
        assert np.array_equal(one[index].input_ids, other[index].input_ids)
        assert np.array_equal(one[index].labels, other[index].labels)
