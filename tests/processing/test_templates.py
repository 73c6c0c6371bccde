"""The choice of a chat template, and its trial on the tokenizer before anything is built on it."""

import pytest
from tokenizers import processors
from transformers import CLIPImageProcessorPil

from mllm.errors import OptionError
from mllm.processing.build import add_placeholder, build_processor
from mllm.processing.chat import end_of_turn_ids
from mllm.processing.templates import TEMPLATES, choose_template, named_template
from mllm.sizes import ImageTokenRule
from mllm.testing import tiny_tokenizer

RULE = ImageTokenRule(image_size=16, patch_size=8, num_prefix_tokens=1, feature_select="default")

OWN = """{{- bos_token }}{% for message in messages %}
{{- '[' + message['role'] + '] ' }}
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{%- else %}{{ message['content'] }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"""


def _processor(kind, template=None, *, own=None):
    tokenizer = tiny_tokenizer(kind)
    tokenizer.chat_template = own
    add_placeholder(tokenizer, "<image>", num_rows=len(tokenizer) + 1)
    return build_processor(tokenizer, CLIPImageProcessorPil(), rules={"image": RULE}, chat_template=template)


@pytest.mark.parametrize(("kind", "end"), [("qwen", "<|im_end|>"), ("llama3", "<|eot_id|>")])
def test_known_by_its_control_tokens(kind, end):
    processor = _processor(kind)
    assert processor.end_of_turn_token == end
    assert processor.chat_template == _processor(kind, {"qwen": "chatml", "llama3": "llama3"}[kind]).chat_template


@pytest.mark.parametrize("kind", ["llama2", "gpt_neox"])
def test_unknown_tokenizer_must_name_one(kind):
    with pytest.raises(OptionError, match="choose `chat_template` among plain, vicuna_v1, chatml, llama3"):
        _processor(kind)


def test_own_template_that_marks_generation_is_used():
    """It was made for strings, and takes images through the part that we put in front."""
    own = OWN.replace("'[assistant] '", "'[assistant]\\n'").replace("'] ' }}", "']\\n' }}")
    processor = _processor("qwen", own=own)
    assert processor.chat_template.endswith(own)
    assert processor.end_of_turn_token == "<|im_end|>"
    content = [{"type": "image"}, {"type": "text", "text": "Is there a 5?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "No."}]
    encoded = processor.encode_chat(messages, media_sizes=[(1, 1)])
    text = processor.decode(encoded.input_ids)
    assert text == "[user]\n" + "<image>" * 4 + "\nIs there a 5?[assistant]\nNo.<|im_end|>"
    labels = [token for token, weight in zip(encoded.input_ids, encoded.loss_weights, strict=True) if weight]
    assert processor.decode(labels) == "No.<|im_end|>"


def test_own_template_that_marks_nothing_is_replaced():
    processor = _processor("qwen", own=OWN.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    assert "[assistant]" not in processor.chat_template


def test_a_name_goes_before_the_own_template():
    assert _processor("qwen", "vicuna_v1", own=OWN).chat_template == _processor("qwen", "vicuna_v1").chat_template


@pytest.mark.parametrize("choice", ["chat-ml", "{{ messages }}"])
def test_neither_name_nor_template(choice):
    with pytest.raises(OptionError, match="one of plain, vicuna_v1, chatml, llama3, or the text of a template"):
        _processor("qwen", choice)


@pytest.mark.parametrize(
    ("kind", "name", "missing"),
    [
        ("llama3", "chatml", "<|im_start|>, <|im_end|>"),
        ("qwen", "llama3", "<|start_header_id|>, <|end_header_id|>, <|eot_id|>"),
        ("gpt_neox", "llama3", "<|start_header_id|>"),
    ],
)
def test_tokenizer_without_the_templates_tokens(kind, name, missing):
    with pytest.raises(OptionError) as caught:
        _processor(kind, name)
    assert f"a tokenizer without {missing}" in caught.value.found


def test_tokenizer_without_an_end():
    tokenizer = tiny_tokenizer("qwen")
    tokenizer.eos_token = None
    with pytest.raises(OptionError, match="without an end-of-sequence token"):
        named_template(tokenizer, "vicuna_v1", placeholders={"image": "<image>"})


def test_the_placeholder_may_have_another_name():
    tokenizer = tiny_tokenizer("qwen")
    for name in TEMPLATES:
        if name != "llama3":
            text = choose_template(tokenizer, name, placeholders={"image": "<picture>"}).text
            assert "<picture>" in text
            assert "<image>" not in text


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (OWN.replace("message['content'] + eos_token", "message['content']"), "'No, there is none.' as generated"),
        (OWN.replace("{{ message['content'] + eos_token }}", "{{ '! ' + message['content'] + eos_token }}"), "'! No"),
        (OWN.replace("+ eos_token", "+ eos_token + '\n'"), "as generated"),
        (OWN.replace("{{ '[assistant] ' }}", "{{ '[assistant]:' }}"), "tokens are not those in front of the answer"),
        (OWN.replace("{{- bos_token }}", "{{- '<|im_start|><|im_start|>' }}"), "starts with two <|im_start|>"),
        ("{% generation %}{{ raise_exception('no') }}{% endgeneration %}", "cannot render a plain conversation"),
    ],
)
def test_a_template_that_would_train_something_else_is_refused(broken, fault):
    with pytest.raises(OptionError) as caught:
        _processor("qwen", broken)
    assert fault in caught.value.found


def test_a_boundary_that_a_merge_crosses_is_refused():
    """A blank at a prompt's end joins the first word; GPT-2's rule splits two newlines only where text follows."""
    with pytest.raises(OptionError, match="tokens are not those in front of the answer"):
        _processor("qwen", OWN)
    tokenizer = tiny_tokenizer("gpt_neox")
    tokenizer.add_tokens(list(TEMPLATES["llama3"].tokens), special_tokens=True)
    with pytest.raises(OptionError, match="tokens are not those in front of the answer"):
        build_processor(tokenizer, rules={}, chat_template="llama3")


def test_a_tokenizer_that_ends_every_text_is_refused():
    tokenizer = tiny_tokenizer("qwen")
    end = ("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[end]
    )
    with pytest.raises(OptionError, match="tokens are not those in front of the answer"):
        build_processor(tokenizer, rules={})


def test_a_tokenizer_that_adds_a_bos_to_one_that_the_template_writes():
    """Stock code, and we, look for the BOS by its name; a tokenizer that hides it would get two."""
    tokenizer = tiny_tokenizer("llama3")
    tokenizer.bos_token = None
    own = "{{- '<|begin_of_text|>' }}" + OWN.replace("] ' }}", "]\\n\\n' }}")
    with pytest.raises(OptionError, match=r"starts with two <\|begin_of_text\|>"):
        build_processor(tokenizer, rules={}, chat_template=own)


def test_placeholder_must_be_there():
    with pytest.raises(OptionError, match="add_placeholder"):
        build_processor(tiny_tokenizer("qwen"), CLIPImageProcessorPil(), rules={"image": RULE})


def test_generation_stops_at_the_end_of_turn_and_at_the_end_of_text():
    tokenizer = tiny_tokenizer("qwen")
    tokenizer.eos_token = "<|endoftext|>"
    processor = build_processor(tokenizer, rules={})
    assert tokenizer.convert_ids_to_tokens(end_of_turn_ids(processor)) == ["<|im_end|>", "<|endoftext|>"]
