"""Conversations drawn by chance, made to trip over."""

import random

# What templates, tokenizers and stand-ins could trip over: blanks of all kinds at the ends, nothing but blanks,
# letters that NFC changes, control tokens whole and in parts, stand-ins themselves.
WORDS = (
    *("a red 3", "Is there a 5?", "\n", " ", "  two  ", "\n\nMore.\n\n\n", "\tx", "y\u00a0", "\u3000z", "\x1fq\x1c"),
    *("Grüße", "你好", "e\u0301", "\u0958\u0958", "\U0001d160", "😀", "\ufeff", "\u200b", "ﬁ", "ﷺ", "\x00"),
    *("<image>", "<|im_end|>", "<|im_start|>", "</s>", "<s>", "<unk>", "<|eot_id|>", "<tool_call>", "<", "<|im_"),
    *("\ue0000\ue001", "\ue000", "{{ bos_token }}", "{% raw %}", "ASSISTANT:", "USER: ", "'s", "123456", "a" * 50),
    *("", "end|>", "\ufdd0", "\ufdd0<image>", "<0x0A>", "▁", "▁▁a"),
)  # fmt: skip


def _content(draw: random.Random, *, images: bool):
    if draw.random() < 0.3:
        return "".join(draw.choices(WORDS, k=draw.randint(0, 3)))
    kinds = ["text", "image"] if images else ["text"]
    items = [{"type": draw.choice(kinds)} for _ in range(draw.randint(1, 4))]
    return [item | ({"text": "".join(draw.choices(WORDS, k=2))} if item["type"] == "text" else {}) for item in items]


def conversation(draw: random.Random) -> list[dict]:
    """Up to three exchanges, now and then with a system message, roles in disorder, several items or a `loss`."""
    roles = ["system"] * (draw.random() < 0.2) + ["user", "assistant"] * draw.randint(1, 3)
    if draw.random() < 0.1:
        draw.shuffle(roles)
    messages = [
        {"role": role, "content": _content(draw, images=role == "user" or draw.random() < 0.1)} for role in roles
    ]
    for message in messages:
        if message["role"] == "assistant" and draw.random() < 0.2:
            message["loss"] = draw.choice([True, False, 0.5, None])
    return messages
