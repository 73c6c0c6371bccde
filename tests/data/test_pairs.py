"""Preference rows as pairs: which sides there are, what each shows and says, and which rows are refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from mllm.data.contrasts import Contrast
from mllm.data.labels import IGNORED
from mllm.data.left_out import LeftOut
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.data.pairs import Pair, Pairs, names_of_sides, pair_of
from mllm.data.schema import parse_row
from mllm.errors import OptionError, RowError
from mllm.load import load_processor
from mllm.processing.stock import StockProcessor
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.testing_pairs import save_tiny_pairs

RETRIEVED, CROP, BLANK = (Contrast(media) for media in ("retrieved", "crop", "blank"))
UNSEEN = Contrast(is_unseen_needed=True)


@pytest.fixture(scope="module")
def processor(assembled):
    return load_processor(assembled)


@pytest.fixture
def fields(pairs) -> dict:
    """The first of the tiny rows, to be changed."""
    return json.loads(pairs.read_text().splitlines()[0])


def _pair(fields: dict, processor, contrast: Contrast, **options) -> Pair | LeftOut:
    return pair_of(parse_row(fields, where="the test", root=Path("/media")), processor, contrast, **options)


def _words(side, processor) -> str:
    return processor.tokenizer.decode(side.labels[side.labels != IGNORED].tolist(), skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("contrast", "names"),
    [
        (Contrast(), ("chosen", "rejected")),
        (RETRIEVED, ("chosen", "rejected", "contrast")),
        (UNSEEN, ("chosen", "rejected", "chosen_unseen", "rejected_unseen")),
        (
            Contrast("crop", is_unseen_needed=True),
            ("chosen", "rejected", "contrast", "chosen_unseen", "rejected_unseen"),
        ),
    ],
)
def test_every_side_learns_its_own_answer_and_nothing_else(fields, processor, contrast, names):
    pair = _pair(fields, processor, contrast)
    assert names_of_sides(contrast) == names
    answers = [fields["rejected" if name.startswith("rejected") else "chosen"]["content"] for name in names]
    assert [_words(side, processor) for side in pair.sides] == answers
    prompts = [side.input_ids[: int(np.argmax(side.labels != IGNORED))].tolist() for side in pair.sides]
    assert prompts.count(prompts[0]) == len(names), "one question"


def test_an_answer_given_before_is_not_learned(fields, processor):
    before = {"role": "assistant", "content": "Said before."}
    fields["messages"] = [*fields["messages"], before, {"role": "user", "content": "And now?"}]
    pair = _pair(fields, processor, Contrast())
    answers = [fields[side]["content"] for side in ("chosen", "rejected")]
    assert [_words(side, processor) for side in pair.sides] == answers


def test_sides_share_what_they_both_show(fields, processor):
    own, other = (Path("/media") / fields[key][0]["path"] for key in ("media", "contrast"))
    pair = _pair(fields, processor, RETRIEVED)
    assert [shown.item.path for shown in pair.shown] == [own, other]
    assert pair.places == ((0,), (0,), (1,))
    crop = _pair(fields, processor, CROP)
    assert [(shown.item.path, shown.change) for shown in crop.shown] == [(own, ""), (own, "crop")]
    unseen = _pair(fields, processor, UNSEEN)
    assert [shown.change for shown in unseen.shown] == ["", "blank"] and unseen.places == ((0,), (0,), (1,), (1,))


def test_a_side_with_one_more_medium_in_common_shares_none(fields, processor):
    """Some models see an image differently beside another one, so only whole sides are shared."""
    first, second = fields["media"][0], fields["contrast"][0]
    fields["messages"][0]["content"].insert(0, {"type": "image"})
    fields |= {"media": [first, second], "contrast": [first, {**second, "path": "third.png"}]}
    pair = _pair(fields, processor, RETRIEVED)
    assert len(pair.shown) == 4 and pair.places == ((0, 1), (0, 1), (2, 3))


def test_an_answer_may_have_media_of_its_own(fields, processor):
    fields["rejected"] = {"content": fields["chosen"]["content"], "media": fields.pop("contrast")}
    pair = _pair(fields, processor, Contrast())
    assert pair.places == ((0,), (1,))
    assert _words(pair.sides[0], processor) == _words(pair.sides[1], processor)


def test_a_row_without_media_is_a_pair_of_texts(fields, processor):
    fields["messages"][0]["content"] = "What is there?"
    fields |= {"media": [], "contrast": None}
    assert _pair(fields, processor, Contrast()).places == ((), ())
    assert _pair(fields, processor, UNSEEN).shown == ()


def test_length_counts_all_sides_and_the_limit_each(fields, processor):
    pair = _pair(fields, processor, RETRIEVED)
    longest = max(side.length for side in pair.sides)
    assert pair.length == sum(side.length for side in pair.sides)
    assert isinstance(_pair(fields, processor, RETRIEVED, max_length=longest), Pair)
    left_out = _pair(fields, processor, RETRIEVED, max_length=longest - 1)
    assert left_out.reason == "longer than max_length" and not left_out.is_error
    assert _pair(fields, processor, RETRIEVED, max_length=longest - 1, overlong="error").is_error


def _same_answers(fields):
    fields["rejected"]["content"] = fields["chosen"]["content"]


def _empty_answer(fields):
    fields["rejected"]["content"] = " \n"


def _empty_items(fields):
    fields["chosen"]["content"] = [{"type": "text", "text": ""}]


def _same_answers_and_media(fields):
    fields["rejected"] = {"content": fields["chosen"]["content"], "media": fields["media"]}


def _nothing_retrieved(fields):
    del fields["contrast"]


def _own_image_retrieved(fields):
    fields["contrast"] = fields["media"]


def _image_in_an_answer(fields):
    fields["chosen"]["content"] = [{"type": "image"}, {"type": "text", "text": "this"}]


BAD_ROWS = [
    (_same_answers, "chosen and rejected are the same"),
    (_same_answers_and_media, "chosen and rejected are the same"),
    (_empty_answer, "the rejected answer is empty"),
    (_empty_items, "the chosen answer is empty"),
    (_nothing_retrieved, "no retrieved image"),
    (_own_image_retrieved, "the retrieved image is the row's own"),
    (_image_in_an_answer, "image"),
]


@pytest.mark.parametrize(("spoil", "found"), BAD_ROWS, ids=[spoil.__name__[1:] for spoil, _ in BAD_ROWS])
def test_a_broken_row_is_left_out_with_its_reason(fields, processor, spoil, found):
    spoil(fields)
    left_out = _pair(fields, processor, RETRIEVED)
    assert isinstance(left_out, LeftOut) and isinstance(left_out.error, RowError) and not left_out.is_error
    assert found in left_out.bad.reason and left_out.bad.id == "0"


def test_what_is_not_compared_is_not_asked_for(fields, processor):
    _nothing_retrieved(fields)
    assert isinstance(_pair(fields, processor, Contrast()), Pair)
    assert isinstance(_pair(fields, processor, CROP), Pair)


def test_a_crop_wants_an_image(fields, processor):
    fields["messages"][0]["content"] = "What is there?"
    fields |= {"media": [], "contrast": None}
    assert "no image to contrast" in _pair(fields, processor, CROP).error.found
    assert "no image to contrast" in _pair(fields, processor, BLANK).error.found


def test_sides_with_other_numbers_of_media_are_no_row(fields):
    fields["contrast"] *= 2
    with pytest.raises(RowError, match="contrast: 2 media items\nexpected: as many, of the same kinds"):
        parse_row(fields, where="the test", root=Path())
    fields["contrast"] = None
    fields["rejected"]["media"] = []
    with pytest.raises(RowError, match="rejected, media: 0 media items"):
        parse_row(fields, where="the test", root=Path())


def test_media_that_the_model_does_not_read_are_left_out(fields, tmp_path):
    stock = StockProcessor.from_pretrained(save_stock_checkpoint(tmp_path / "stock", "qwen2_audio"))
    left_out = _pair(fields, stock, RETRIEVED)
    assert left_out.reason == "image, for which the model has no tower" and left_out.error is None


def test_a_conversation_is_no_preference(rows, processor):
    mixture = open_mixture(read_mixture([str(rows)]))
    assert pair_of(mixture[0], processor, RETRIEVED).is_error
    with pytest.raises(RowError, match="no preference.*\n.*\n.*train/sft.py"):
        Pairs(mixture, processor, contrast=RETRIEVED)


@pytest.mark.parametrize("measure", ["counted", "bounded"])
def test_a_large_mixture_is_measured_without_being_encoded(pairs, processor, measure):
    """By the longest side of each row, as often as there are sides: at least what the pair has."""
    mixture = open_mixture(read_mixture([str(pairs)]))
    exact = Pairs(mixture, processor, contrast=RETRIEVED)
    rough = Pairs(mixture, processor, contrast=RETRIEVED, measure=measure)
    longest = [3 * max(side.length for side in pair.sides) for pair in exact]
    assert (rough.lengths >= longest).all() and (measure == "bounded" or rough.lengths.tolist() == longest)
    for one, other in zip(exact[3].sides, rough[3].sides, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
    limit = int(max(longest)) // 3 - 1
    assert len(Pairs(mixture, processor, contrast=RETRIEVED, measure="counted", max_length=limit)) < len(exact)


def test_media_of_a_row_are_those_of_its_pair(tmp_path, processor):
    mixture = open_mixture(read_mixture([str(save_tiny_pairs(tmp_path, 4, has_image=(1, 2)))]))
    examples = Pairs(mixture, processor, contrast=Contrast())
    assert [examples.media_of(pair.position) for pair in examples] == [pair.media_items for pair in examples]
    assert [len(pair.media_items) for pair in examples] == [0, 1, 1, 0]
    with pytest.raises(OptionError, match="no row left"):
        Pairs(mixture, processor, contrast=Contrast(), max_length=3)
