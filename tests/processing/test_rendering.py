"""A template that is rendered once for many conversations gives what it gives for each."""

import random

import pytest
from transformers import CLIPImageProcessorPil
from transformers.utils.chat_template_utils import render_jinja_template

from mllm.errors import RowError
from mllm.processing.build import add_placeholder, build_processor
from mllm.processing.messages import plain_messages
from mllm.sizes import ImageTokenRule
from mllm.testing import tiny_tokenizer
from mllm.testing_chats import conversation

RULE = ImageTokenRule(image_size=16, patch_size=8, num_prefix_tokens=1, feature_select="default")
PAIRS = [("qwen", "chatml"), ("qwen", "plain"), ("llama3", "llama3"), ("llama2", "vicuna_v1")]


def _processor(kind, template):
    tokenizer = tiny_tokenizer(kind)
    add_placeholder(tokenizer, "<image>", num_rows=len(tokenizer) + 1)
    return build_processor(tokenizer, CLIPImageProcessorPil(), rules={"image": RULE}, chat_template=template)


@pytest.mark.parametrize(("kind", "template"), PAIRS)
def test_shapes_render_as_the_template_does(kind, template):
    draw, processor = random.Random(f"{kind} {template}"), _processor(kind, template)
    render, num_rendered = processor.chat_encoder().render, 0
    assert render.is_opaque
    for _ in range(300):
        turns, _ = plain_messages(conversation(draw), where="row")
        begins_answer = draw.random() < 0.3
        try:
            found = render(turns, add_generation_prompt=begins_answer, where="row")
        except RowError:
            continue
        texts, spans = render_jinja_template(
            [turns],
            chat_template=processor.chat_template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=begins_answer,
            **processor.tokenizer.special_tokens_map,
        )
        assert found == (texts[0], spans[0])
        num_rendered += 1
    assert num_rendered > 150


def test_one_shape_is_rendered_once(monkeypatch):
    render = _processor("qwen", "chatml").chat_encoder().render
    asked = [{"role": "user", "content": "Is there a 5?"}, {"role": "assistant", "content": "No."}]
    _, spans = render(asked, where="row")
    monkeypatch.setattr(type(render), "_render", None)
    asked[1]["content"] = "Yes, it is."
    text, moved = render(asked, where="row")
    assert text[slice(*moved[0])] == "Yes, it is.<|im_end|>"
    assert moved[0][1] - spans[0][1] == len("Yes, it is.") - len("No.")


def test_roles_that_a_template_refuses_are_named_each_time():
    render = _processor("llama2", "vicuna_v1").chat_encoder().render
    for where in ("row 1", "row 2"):
        with pytest.raises(RowError, match=f"{where}: messages that the chat template refuses"):
            render([{"role": "tool", "content": "5"}], where=where)
