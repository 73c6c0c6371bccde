"""A gap writer writes what the model wants where the kept words allow it, and keeps these in any case."""

import random

import pytest
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerBase

from mllm.preference_data.answer_ids import continuation_ids, encode_answer
from mllm.preference_data.completer import gaps_of
from mllm.preference_data.gap_writer import GapWriter
from mllm.preference_data.masker import RuleMasker
from mllm.preference_data.phrases import Masked, Phrase
from mllm.processing import MllmProcessor
from mllm.processing.build import add_placeholder, build_processor
from mllm.sizes import ImageTokenRule
from mllm.testing import TOKENIZER_KINDS, tiny_tokenizer

CAPTION = "There is a red 5 in the top left, and an orange 0 in the bottom right."
FILLINGS = (
    ("a blue 7", "bottom right", "a 3", "middle"),
    ("an orange 44", "top", "two green digits", "centre left"),
)


@pytest.fixture(scope="module", params=TOKENIZER_KINDS)
def processor(request) -> MllmProcessor:
    """Of every kind of tokenizer, with a template that suits it."""
    return _processor(request.param, {"qwen": "chatml", "llama3": "llama3"}.get(request.param, "vicuna_v1"))


@pytest.mark.parametrize("words", FILLINGS)
def test_what_a_model_wants_is_written_where_it_keeps_the_words(processor, words):
    """A model that has the whole new answer in mind gets its way, token for token."""
    [(_, masked)] = RuleMasker().mask([CAPTION])
    wanted = encode_answer(processor, masked.filled(words)).words
    opening = encode_answer(processor, masked.kept[0].rstrip()).words
    assert wanted[: len(opening)] == opening
    writer = _writer(processor, masked, last_id=opening[-1])
    written = [writer.next_token([token, *range(40)]) for token in wanted[len(opening) :]]
    assert written == wanted[len(opening) :]
    assert tuple(writer.words) == words and writer.next_token(wanted[:9]) in writer.end_ids


@pytest.mark.parametrize("seed", range(5))
def test_whatever_a_model_wants_the_kept_words_stay(processor, seed):
    [(_, masked)] = RuleMasker().mask([CAPTION])
    opening = encode_answer(processor, masked.kept[0].rstrip()).words
    writer, random_ = _writer(processor, masked, last_id=opening[-1]), random.Random(seed)
    vocabulary = range(len(processor.tokenizer))
    written = list(opening)
    while written[-1] not in writer.end_ids:
        written.append(writer.next_token(random_.sample(vocabulary, 64)))
        assert len(written) <= len(opening) + writer.most_tokens
    assert len(writer.words) == len(masked.phrases) and all(writer.words)
    said = _squeezed(processor.tokenizer, written)
    assert said == "".join(masked.filled(writer.words).split())


def test_a_model_without_a_word_to_say_comes_to_an_end(processor):
    [(_, masked)] = RuleMasker().mask([CAPTION])
    opening = encode_answer(processor, masked.kept[0].rstrip()).words
    writer, written = _writer(processor, masked, last_id=opening[-1]), list(opening)
    stubborn = [processor.tokenizer.eos_token_id, *processor.tokenizer.encode(" !", add_special_tokens=False)]
    for _ in range(writer.most_tokens):
        written.append(writer.next_token(stubborn))
    assert written[-1] in writer.end_ids and len(writer.words) == len(masked.phrases)
    assert set(written[: len(opening) + 3]).isdisjoint(writer.end_ids)  # no gap is ended by ending the turn
    assert _squeezed(processor.tokenizer, written) == "".join(masked.filled(writer.words).split())


def test_a_gap_ends(processor):
    """Where the model ends its turn, begins a line, writes a sign, goes on with what follows, or goes on and on."""
    masked = Masked("There is a red cup in the top", (Phrase(9, 18),))
    behind = continuation_ids(processor, " in the top")
    blue = continuation_ids(processor, " blue")
    ends = {
        "turn": processor.tokenizer.eos_token_id,
        "line": processor.tokenizer.encode("\n", add_special_tokens=False)[-1],
        "sign": continuation_ids(processor, ".")[0],
        "next": behind[0],
    }
    for end in ends.values():
        writer = _writer(processor, masked, last_id=encode_answer(processor, "There is").words[-1])
        assert [writer.next_token([token, *blue]) for token in blue] == blue
        written = [writer.next_token([end, *blue]) for _ in behind]
        assert written == behind and writer.words == ["blue"]
    writer = _writer(processor, masked, last_id=encode_answer(processor, "There is").words[-1])
    assert [writer.next_token([token]) for token in blue] == blue
    assert writer.next_token([blue[0], behind[0]], num_likely=2) == behind[0] and writer.words == ["blue"]
    writer = _writer(processor, masked, last_id=encode_answer(processor, "There is").words[-1])
    for token in blue * 20:
        writer.next_token([token, *blue])
    assert 1 < writer.words[0].split().count("blue") < 15


@pytest.mark.parametrize(
    ("phrase", "wanted", "written"),
    [
        ("a red 5", "a blue 7 and a green 3", "a blue 7"),
        ("a red 5", "black and white 7", "black and white 7"),
        ("salt and oil", "a blue 7 and a green 3", "a blue 7 and a green 3"),
        ("a red 5", "a blue 7, a green 3", "a blue 7"),
        ("an old, red 5", "a blue, green 3", "a blue, green 3"),
    ],
)
def test_a_gap_says_no_more_than_its_phrase(phrase, wanted, written):
    """Neither a new sign nor a new "and" behind a thing; read with a tokenizer that has these words whole."""
    processor = _processor("qwen", "chatml", words=("and", "black", "white", "blue", "green"))
    masked = Masked(f"There is {phrase} in the top", (Phrase(9, 9 + len(phrase)),))
    opening = encode_answer(processor, "There is").words
    writer = _writer(processor, masked, last_id=opening[-1])
    for token in encode_answer(processor, masked.filled([wanted])).words[len(opening) :]:
        writer.next_token([token, *range(40)])
        if writer.words:
            break
    assert writer.words == [written]


def test_a_gap_is_never_empty(processor):
    masked = Masked("There is a red cup in the top", (Phrase(9, 18),))
    writer = _writer(processor, masked, last_id=encode_answer(processor, "There is").words[-1])
    unfit = [
        processor.tokenizer.eos_token_id,
        continuation_ids(processor, " in")[0],
        continuation_ids(processor, ".")[0],
    ]
    blue = continuation_ids(processor, " blue")
    assert writer.next_token([*unfit, blue[0]]) == blue[0]


def test_a_word_is_not_continued_into_a_gap(processor):
    """Behind "a" and a blank no "n" may come: the kept word would be another."""
    masked = Masked("a cup", (Phrase(2, 5),))
    writer = _writer(processor, masked, last_id=encode_answer(processor, "a").words[-1])
    letter, word = continuation_ids(processor, "n")[-1], continuation_ids(processor, " blue")[0]
    assert writer.next_token([letter, word]) == word


def _processor(kind: str, template: str, *, words: tuple[str, ...] = ()) -> MllmProcessor:
    tokenizer = tiny_tokenizer(kind)
    tokenizer.add_tokens([f" {word}" for word in words])
    add_placeholder(tokenizer, "<image>", num_rows=len(tokenizer) + 1)
    rule = ImageTokenRule(image_size=16, patch_size=8, num_prefix_tokens=1, feature_select="default")
    return build_processor(tokenizer, CLIPImageProcessorPil(), rules={"image": rule}, chat_template=template)


def _writer(processor, masked: Masked, *, last_id: int) -> GapWriter:
    tokenizer = processor.tokenizer
    gaps = gaps_of(masked, processor, slack=8)
    return GapWriter(gaps, last_id=last_id, tokenizer=tokenizer, end_ids=[tokenizer.eos_token_id])


def _squeezed(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return "".join(tokenizer.decode(ids, skip_special_tokens=True).split())
