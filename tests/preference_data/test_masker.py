"""Which phrases of an answer are masked: by rules, and as a model's reply says."""

import pytest

from mllm.errors import EndpointError, OptionError, RowError
from mllm.preference_data.endpoint import Endpoint
from mllm.preference_data.masker import KINDS, EndpointMasker, RuleMasker, masked_as
from mllm.preference_data.phrases import BAD_REPLY, NO_PHRASE, Masked

ANSWERS = {
    "There is a red 5 in the top left and an orange 0 in the bottom right.": (
        "There is [MASK] in the [MASK] and [MASK] in the [MASK]."
    ),
    "A man is riding a brown horse on the beach.": "[MASK] is [MASK] on the [MASK].",
    "The image shows two small dogs.": "The image shows [MASK].",
    "The picture is of an old wooden chair.": "The picture is of [MASK].",
    'A sign says "NO ENTRY AFTER 6".': '[MASK] says "[MASK]".',
    "It is not very likely.": "It is not very likely.",
    "Yes, there is a 7.": "[MASK], there is [MASK].",
    "no": "[MASK]",
    "There isn’t a dog, and there isn't a cat.": "There isn’t [MASK], and there isn't [MASK].",
    "It is.": "[MASK].",
    "3.5 cm": "[MASK]",
    "The two-story house is really bright.": "The [MASK] is really [MASK].",
    "To the left of the clock, a cat is sitting.": "[MASK] the [MASK], [MASK] is [MASK].",
}


@pytest.mark.parametrize(("answer", "expected"), ANSWERS.items())
def test_things_and_what_is_said_of_them_are_masked(answer, expected):
    assert _masked(RuleMasker(), answer).masked_text == expected


def test_kinds_are_told_apart():
    masked = _masked(RuleMasker(), "Yes, a small red cup holds two flowers behind the 5 and a tall tree is falling")
    kinds = dict(zip(masked.words, (phrase.kind for phrase in masked.phrases), strict=True))
    assert kinds["Yes"] == "answer" and set(kinds.values()) <= set(KINDS)
    found = {kind: _masked(RuleMasker(kinds=(kind,)), masked.text).words for kind in KINDS}
    assert found == {
        "answer": ("Yes",),
        "attribute": ("a small", "a tall"),
        "colour": ("red",),
        "object": ("cup", "flowers", "tree"),
        "number": ("two", "5"),
        "relation": ("behind",),
        "action": ("holds", "falling"),
    }


def test_a_relation_that_would_make_a_phrase_too_long_stays():
    text = "A red cup behind two small plates."
    assert _masked(RuleMasker(longest=7), text).words == ("A red cup behind two small plates",)
    assert _masked(RuleMasker(longest=6), text).words == ("A red cup", "two small plates")


def test_a_share_is_drawn_by_seed_and_words_alone():
    texts = [f"There is a red {digit} in the top left and a blue 2 in the middle." for digit in range(30)]
    half = RuleMasker(share=0.5)
    drawn = dict(half.mask(texts))
    every = dict(RuleMasker().mask(texts))
    assert all(len(one.phrases) == 2 and set(one.phrases) < set(every[at].phrases) for at, one in drawn.items())
    assert len({tuple(phrase.start for phrase in one.phrases) for one in drawn.values()}) > 3
    assert dict(half.mask(texts[::-1])) == {at: drawn[29 - at] for at in range(30)}
    assert dict(RuleMasker(share=0.5, seed=1).mask(texts)) != drawn
    assert all(len(one.phrases) == 1 for one in dict(RuleMasker(share=0.01).mask(texts)).values())


def test_an_answer_with_nothing_to_mask_says_so():
    assert _masked(RuleMasker(), "It is not, so what would we do?").reason == NO_PHRASE
    assert _masked(RuleMasker(), "").reason == NO_PHRASE
    assert _masked(RuleMasker(), "...").reason == NO_PHRASE


@pytest.mark.parametrize("options", [{"kinds": ("smell",)}, {"share": 0.0}, {"share": 1.5}, {"longest": 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        RuleMasker(**options)


REPLIES = [
    ("A red cup.", "A [MASK] cup.", "A [MASK] cup."),
    ("A red cup.", "  a [MASK]  CUP . ", "A [MASK] cup."),
    ("A red cup.", "```\nA [MASK] [MASK].\n```", "A [MASK]."),
    ("A red cup.", '"[MASK]."', "[MASK]."),
    ("a cat and a dog", "[MASK] a [MASK]", "[MASK] a [MASK]"),
    ("a b a b", "[MASK] a [MASK]", "[MASK] a [MASK]"),
    ("red", "[MASK]", "[MASK]"),
    ("A red cup.", "A red cup.", "A red cup."),
    ("cups, and cups", "[MASK], and [MASK]", "[MASK], and [MASK]"),
]


@pytest.mark.parametrize(("text", "reply", "expected"), REPLIES)
def test_a_reply_says_what_is_masked(text, reply, expected):
    masked = masked_as(text, reply)
    assert masked.text == text and masked.masked_text == expected
    assert (masked.reason == NO_PHRASE) == (not masked.phrases)


JUNK = ["", "Sure! A [MASK] cup.", "A [MASK] mug.", "[MASK] A red cup.", "A red cup. [MASK]", "cup [MASK] A."]


@pytest.mark.parametrize("reply", JUNK)
def test_a_reply_with_other_words_is_refused(reply):
    with pytest.raises(RowError, match="A red cup"):
        masked_as("A red cup.", reply)


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_the_rules_mask_can_be_read_back(answer):
    masked = _masked(RuleMasker(), answer)
    assert masked_as(answer, masked.masked_text).masked_text == masked.masked_text


def test_an_endpoint_masks(serve):
    server = serve(lambda body, number: body["messages"][-1]["content"].rsplit("\n\n", 1)[1].replace("red", "[MASK]"))
    texts = ["A red cup.", "Red or red?", "A cup."]
    found = dict(EndpointMasker(Endpoint(server.url, model="m")).mask(texts))
    assert [found[at].masked_text for at in range(3)] == ["A [MASK] cup.", "Red or [MASK]?", "A cup."]
    assert [found[at].reason for at in range(3)] == ["", "", NO_PHRASE]
    assert all("objects, attributes, and logical relationships" in str(body) for body in server.bodies)


def test_junk_masks_are_asked_again_and_then_counted(serve):
    server = serve(lambda body, number: "I cannot see any image." if number < 3 else "A [MASK] cup.")
    endpoint = Endpoint(server.url, model="m", tries=3, pause=0.001, concurrency=1)
    found = dict(EndpointMasker(endpoint).mask(["A red cup."] * 2))
    assert found[0] == Masked("A red cup.", (), BAD_REPLY) and found[1].words == ("red",)
    assert endpoint.counts["useless replies"] == 3 and endpoint.counts["requests"] == 4


def test_a_masker_that_is_refused_stops(serve):
    server = serve(lambda body, number: 401)
    with pytest.raises(EndpointError, match="status 401"):
        list(EndpointMasker(Endpoint(server.url, model="m", concurrency=1)).mask(["A red cup."] * 9))
    assert len(server.bodies) == 1


def _masked(masker: RuleMasker, text: str) -> Masked:
    [(_, masked)] = masker.mask([text])
    return masked
