"""What is shown of a row is what the model reads: the same tokens, roles and weights, nothing added or left out."""

import re

import pytest

from mllm.assemble import assemble
from mllm.data.auditing.render import encode_sides, render_row
from mllm.data.auditing.row_text import legend, row_text, visible
from mllm.data.schema import parse_row
from mllm.testing import TOKENIZER_KINDS, save_tiny_parts

HOSTILE = "\x1b[31mred\x07 \u202eback <image> <b>&amp;</b> naïve 猫🪁\r\n"
TEMPLATES = {"llama2": "vicuna_v1", "gpt_neox": "vicuna_v1"}


@pytest.fixture(scope="module", params=TOKENIZER_KINDS)
def processor(request, tmp_path_factory):
    paths = save_tiny_parts(tmp_path_factory.mktemp(request.param), tokenizer=request.param)
    template = {"chat_template": TEMPLATES[request.param]} if request.param in TEMPLATES else {}
    return assemble(**paths, **template)[1]


def talk(root, **changes):
    image = {"kind": "image", "path": "a.png", "height": 30, "width": 40}
    fields = {
        "id": "talk",
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": HOSTILE}, {"type": "image"}]},
            {"role": "assistant", "content": "A kite. 猫"},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "A dog.", "loss": 0.5},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Quite.", "loss": False},
        ],
        "media": [image, image],
        **changes,
    }
    return parse_row(fields, where="rows.jsonl, line 1", root=root)


def pair(root):
    """A preference whose rejected side and contrast have an image of their own."""
    image = {"kind": "image", "path": "a.png", "height": 30, "width": 40}
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    return talk(
        root,
        messages=question,
        media=[image],
        chosen={"content": "A kite."},
        rejected={"content": "A dog.", "media": [{**image, "path": "b.png"}]},
        contrast=[{**image, "path": "c.png"}],
    )


def test_tokens_are_those_that_are_encoded(processor, tmp_path):
    row = talk(tmp_path)
    (side,), (chat,) = render_row(row, processor), encode_sides(row, processor)
    assert not side.problem
    # Each token stands for as many ids as it says, with their weights, in order.
    ids = [one for token in side.tokens for one in (token.ids * token.count if token.media >= 0 else token.ids)]
    weights = [token.weight for token in side.tokens for _ in range(token.count)]
    assert ids == chat.input_ids and weights == chat.loss_weights
    assert [token.media for token in side.tokens if token.media >= 0] == [0, 1]
    assert [token.count for token in side.tokens if token.media >= 0] == [span.length for span in chat.media]
    # And the words are those that the tokenizer decodes.
    words = [one for one in chat.input_ids if one != processor.image_token_id]
    decoded = processor.tokenizer.decode(words, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert "".join(token.text for token in side.tokens).split() == decoded.split()


def test_tokens_have_the_role_of_their_message(processor, tmp_path):
    (side,) = render_row(talk(tmp_path), processor)
    said = {role: "".join(token.text for token in side.tokens if token.role == role) for role in ("system", "user")}
    assert "Be kind." in said["system"] and "kite" not in said["system"]
    assert "And?" in said["user"] and "<image>" in said["user"] and "kite" not in said["user"]
    assert all(token.role == "assistant" for token in side.tokens if token.weight)
    learned = "".join(token.text for token in side.tokens if token.weight)
    assert "A kite. 猫" in learned and "A dog." in learned and "Quite" not in learned
    assert {token.weight for token in side.tokens} == {0.0, 0.5, 1.0}
    assert "\ufffd" not in "".join(token.text for token in side.tokens)


def test_a_preference_shows_its_sides(processor, tmp_path):
    chosen, rejected, contrast = render_row(pair(tmp_path), processor)
    assert [side.title for side in (chosen, rejected, contrast)] == ["chosen", "rejected", "contrast"]
    assert [side.media[0].path.name for side in (chosen, rejected, contrast)] == ["a.png", "b.png", "c.png"]
    learned = ["".join(t.text for t in side.tokens if t.weight).strip() for side in (chosen, rejected, contrast)]
    assert learned[0].startswith("A kite.") and learned[1].startswith("A dog.") and learned[2] == learned[0]


def test_boxes_are_shown_as_the_model_reads_them(processor, tmp_path):
    row = talk(tmp_path, coordinates="pixel")
    row.messages[2]["content"] = "There: [0, 0, 40, 30]."
    (side,) = render_row(row, processor)
    assert "[0.0, 0.125, 1.0, 0.875]" in "".join(token.text for token in side.tokens)  # padded to 40 x 40


def test_what_cannot_be_encoded_is_shown_with_the_reason(processor, tmp_path):
    sound = {"kind": "audio", "path": "a.wav"}
    messages = [
        {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A bell."},
    ]
    (side,) = render_row(talk(tmp_path, messages=messages, media=[sound]), processor)
    assert "audio" in side.problem and not side.length
    assert "".join(token.text for token in side.tokens) == "user: What is it?\nassistant: A bell."


def test_without_a_processor_there_are_texts_and_media(tmp_path):
    (side,) = render_row(talk(tmp_path))
    assert [token.text for token in side.tokens if token.weight == 1.0] == ["A kite. 猫"]
    assert [token.media for token in side.tokens if token.media >= 0] == [0, 1] and side.length == 0


def test_a_terminal_obeys_nothing_that_a_row_says(processor, tmp_path):
    row = talk(tmp_path, id="\x1b]0;title\x07", source="\u202e")
    for text in (row_text(row, processor, colour=False), row_text(row, None, colour=False)):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
        assert r"\x1b[31m" in text.replace("[[", "").replace("]]", "") and r"\u202e" in text
    coloured = row_text(row, processor, colour=True)
    assert re.sub(r"\x1b\[[\d;]+m", "", coloured).isprintable() is False  # line feeds alone
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", re.sub(r"\x1b\[[\d;]+m", "", coloured))


def test_marks_say_what_is_learned_where_there_are_no_colours(processor, tmp_path):
    plain = row_text(talk(tmp_path), processor, colour=False)
    assert re.search(r"\[\[ ?A kite\. 猫", plain) and re.search(r"\[\[ ?A dog\.", plain)
    assert not re.search(r"\[\[ ?Quite", plain)
    assert f"<image> x {processor.num_image_tokens(10, 10)}" in plain
    assert "[[...]]" in legend(colour=False, has_tokens=True)


def test_visible():
    assert visible("a\tb\nc\x1b[0m\x00\x9b\u200b\ud800é猫") == "a\tb\nc\\x1b[0m\\x00\\x9b\\u200b\\ud800é猫"
