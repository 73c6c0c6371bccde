"""Talking with stock checkpoints: the answers are those of transformers' own processor and `generate`."""

import numpy as np
import pytest
import soundfile
from PIL import Image

from mllm.inference.conversation import Chat, generate_answers
from mllm.inference.prompt import encode_prompt
from mllm.inference.text_stream import decode_answer
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.testing_sounds import sine, write_wav


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_answers_equal_transformers(family, tmp_path):
    chat = Chat.from_pretrained(save_stock_checkpoint(tmp_path, family), max_new_tokens=6)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 40, 3), dtype=np.uint8))
    shown = [{"type": "image", "image": image}, {"type": "text", "text": "What is in the picture?"}]
    conversations = [
        [{"role": "user", "content": content}] for content in (shown, "Is there a 5?", [*shown[:1], *shown])
    ]
    expected = []
    for conversation in conversations:
        inputs = chat.processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        made = chat.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(decode_answer(chat.processor.tokenizer, made.tolist()))
    assert any(expected)
    for batch_size in (1, 3):
        answers = generate_answers(chat.model, chat.processor, conversations, batch_size=batch_size, max_new_tokens=6)
        assert answers == expected
    # A stream cannot take back what it has shown, as decoding does of letters before a broken one.
    whole = [number for number, answer in enumerate(expected) if "\ufffd" not in answer]
    assert [chat.reply(conversations[number]) for number in whole] == [expected[number] for number in whole]


def test_answers_about_sounds_equal_transformers(tmp_path):
    """Of Qwen2-Audio, whose sounds are padded to one length."""
    chat = Chat.from_pretrained(save_stock_checkpoint(tmp_path, "qwen2_audio"), max_new_tokens=6)
    path, rate = tmp_path / "tone.wav", chat.processor.sampling_rate
    write_wav(path, sine(0.7, rate=rate), rate=rate)
    content = [{"type": "audio", "audio": str(path)}, {"type": "text", "text": "What do you hear?"}]
    prompt = encode_prompt(chat.processor, [{"role": "user", "content": content}])
    samples, _ = soundfile.read(path, dtype="float32")
    text = chat.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "audio"}, content[1]]}], tokenize=False, add_generation_prompt=True
    )
    inputs = chat.processor.processor(text=text, audio=[samples], sampling_rate=rate, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == prompt.input_ids
    made = chat.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = chat.reply([{"role": "user", "content": content}])
    assert answer == decode_answer(chat.processor.tokenizer, made.tolist())
