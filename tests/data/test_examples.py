import numpy as np
import pytest

from mllm.data import examples as examples_module
from mllm.data.examples import Examples, encode_row
from mllm.data.labels import IGNORED
from mllm.data.rows import Rows, RowSource
from mllm.errors import OptionError, RowError
from mllm.testing import save_tiny_rows, tiny_model


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("parts"))[1]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return Rows([RowSource(save_tiny_rows(tmp_path_factory.mktemp("rows") / "rows", 6))])


def test_an_example_learns_the_answer_and_its_end_of_turn(rows, processor):
    example = encode_row(rows[1], processor)
    learned = example.labels[example.labels != IGNORED]
    assert processor.tokenizer.decode(learned).strip() == "a red 3 and a 7<|im_end|>"
    assert example.loss_weights is None
    spans = example.input_ids == processor.image_token_id
    assert spans.sum() == 4 and (example.labels[spans] == IGNORED).all()


def test_longer_rows_are_dropped_and_counted(rows, processor):
    whole = Examples(rows, processor)
    limit = sorted(whole.lengths)[3]
    some = Examples(rows, processor, max_length=limit)
    kept = [index for index, length in enumerate(whole.lengths) if length <= limit]
    assert some.used == kept and len(some) == len(kept) < 6
    assert some.dropped == {"longer than max_length": 6 - len(kept)}
    assert [some[n].row.id for n in range(len(some))] == [rows[n].id for n in kept]


def test_a_longer_row_is_an_error_where_that_is_asked_for(rows, processor):
    with pytest.raises(RowError, match=r"row 'row-0' .* has \d+ tokens"):
        Examples(rows, processor, max_length=10, overlong="error")


def test_no_row_left(rows, processor):
    with pytest.raises(OptionError, match="no row left of 6 .*longer than max_length"):
        Examples(rows, processor, max_length=10)


def test_unknown_policy(rows, processor):
    with pytest.raises(OptionError, match="overlong = 'cut'"):
        Examples(rows, processor, overlong="cut")


def test_rows_with_nothing_to_learn_are_dropped(rows, processor):
    messages = [rows[0].messages[0], rows[0].messages[1] | {"loss": 0.0}]
    silent = type(rows[0])(id="s", source="", messages=messages, media=(), where="here")
    examples = Examples([silent, rows[0]], processor)
    assert examples.used == [1] and examples.dropped == {"nothing to learn from": 1}


def test_weights_travel_where_they_are_uneven(rows, processor):
    messages = [rows[0].messages[0], rows[0].messages[1] | {"loss": 0.5}]
    half = encode_row(type(rows[0])(id="s", source="", messages=messages, media=(), where="here"), processor)
    assert set(half.loss_weights.tolist()) == {0.0, 0.5}
    assert ((half.labels != IGNORED) == (half.loss_weights > 0)).all()


def test_beyond_the_cache_rows_are_encoded_again_to_the_same(rows, processor, monkeypatch):
    cached = Examples(rows, processor)
    monkeypatch.setattr(examples_module, "CACHED_TOKENS", 50)
    again = Examples(rows, processor)
    assert again._cache is None
    for index in range(6):
        assert np.array_equal(cached[index].input_ids, again[index].input_ids)
        assert np.array_equal(cached[index].labels, again[index].labels)


def test_progress_counts_every_row(rows, processor):
    seen = []
    Examples(rows, processor, max_length=45, progress=lambda: seen.append(1))
    assert len(seen) == 6
