"""Tiny tokenizers, processors and models made in memory, for tests and scripts. Nothing is downloaded."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mllm.assemble import assemble
from mllm.models import MllmForConditionalGeneration
from mllm.processing import MllmProcessor
from mllm.testing_sounds import save_tiny_audio_encoder

# Enough words for merges to exist, so that a token can be longer than one letter and a boundary can be crossed.
CORPUS = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is in the picture? ASSISTANT: The picture shows a red 3 at the top left and a blue 7 below it.",
    "system user assistant\n\nIs there a 5?\n\nNo, there is no 5.\nYes.\n",
    "How many digits are green? Two digits are green: 4 and 9.",
    "Blank lines.\n\n\nMore.\n\n\nMore.\n\n\nMore.\n\n\nEnd.\n\n",
)

# The pre-tokenisation rules of GPT-2 (also GPT-NeoX), and of Qwen2 and Llama 3 (which differ in digits only).
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

TOKENIZER_KINDS = ("qwen", "llama3", "llama2", "gpt_neox")


def tiny_tokenizer(kind: str = "qwen", *, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Make a small tokenizer of the same construction as a famous one, with that family's special tokens.

    Args:
        kind: "qwen" (byte-level BPE, no BOS, ChatML tokens), "llama3" (byte-level BPE, its post-processor adds a BOS),
            "llama2" (SentencePiece-like BPE with byte fallback, a blank put in front of every text, adds a BOS;
            Vicuna's too) or "gpt_neox" (byte-level BPE whose only special token is an end-of-text token; Pythia's).
        vocab_size: Size of the trained vocabulary, special tokens not counted.
    """
    build = {"qwen": _qwen, "llama3": _llama3, "llama2": _llama2, "gpt_neox": _gpt_neox}[kind]
    return build(vocab_size)


def _qwen(vocab_size: int) -> PreTrainedTokenizerFast:
    backend = _byte_level_bpe(QWEN2_WORDS, vocab_size)
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens([_special(text) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    backend.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _llama3(vocab_size: int) -> PreTrainedTokenizerFast:
    backend = _byte_level_bpe(LLAMA3_WORDS, vocab_size)
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id", "reserved_special_token_0")
    backend.add_special_tokens([_special(f"<|{name}|>") for name in names])
    _add_bos(backend, "<|begin_of_text|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|end_of_text|>"
    )


def _llama2(vocab_size: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = [_special(text) for text in ("<unk>", "<s>", "</s>")]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    # Trained word by word, as SentencePiece does, so that no piece has a blank inside; used without that split.
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + 256, special_tokens=[*special, *bytes_], show_progress=False, limit_alphabet=200
    )
    backend.train_from_iterator((text.replace("\n", " ") for text in CORPUS), trainer)
    backend = _without_special(backend, bytes_)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _add_bos(backend, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def _gpt_neox(vocab_size: int) -> PreTrainedTokenizerFast:
    backend = _byte_level_bpe(GPT2_WORDS, vocab_size)
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens([_special("<|endoftext|>")])
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end)


def _byte_level_bpe(words: str, vocab_size: int) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _without_special(backend: Tokenizer, texts: list[str]) -> Tokenizer:
    """The same tokenizer in which `texts` are plain pieces of the vocabulary, and without a pre-tokenizer."""
    fields = json.loads(backend.to_str())
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["content"] not in texts]
    fields["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(fields))


def _add_bos(backend: Tokenizer, bos: str) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def _special(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


def tiny_encoder(family: str = "clip_vision_model", *, image_size: int = 16, num_layers: int = 3) -> PreTrainedModel:
    """A random encoder of one of the families in `mllm.models.encoders`, 16 px images in 8 px patches."""
    config = AutoConfig.for_model(
        family,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=8,
        **({"num_register_tokens": 4} if family in ("dinov2_with_registers", "dinov3_vit") else {}),
    )
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval()


def tiny_llm(family: str = "llama", *, vocab_size: int, tied: bool = False, **fields) -> PreTrainedModel:
    """A random two-layer language model of any family of `AutoModelForCausalLM`."""
    # Families that would otherwise take a head width of 128 or more, whatever the hidden size.
    has_own_head_dim = "head_dim" in CONFIG_MAPPING[family].__dataclass_fields__
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=fields.pop("num_hidden_layers", 2),
        num_attention_heads=4,
        num_key_value_heads=2,
        **({"head_dim": 8} if has_own_head_dim else {}),
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **fields,
    )
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).eval()


def save_tiny_parts(
    directory: Path,
    *,
    encoder: str = "clip_vision_model",
    llm: str = "llama",
    tokenizer: str = "qwen",
    spare_rows: int = 8,
    tied: bool = False,
    image: Mapping[str, Any] | None = None,
    audio: Mapping[str, Any] | None = None,
    video: Mapping[str, Any] | None = None,
    **fields,
) -> dict[str, Any]:
    """Save a tiny encoder and a tiny language model as downloads look, and return them as options of `assemble`.

    Args:
        directory: Where `encoder` and `llm` are made.
        encoder: Encoder family.
        llm: Language model family.
        tokenizer: Kind of tokenizer, see `tiny_tokenizer`.
        spare_rows: Vocabulary rows above the tokenizer's ids; 0 makes `assemble` extend the embedding.
        tied: Whether head and embedding share their matrix.
        image: Further options of the image tower.
        audio: Options of an audio tower, for which a tiny encoder is saved; `encoder` is its family, by default
            "whisper". None for no such tower.
        video: Options of a video tower; None for no such tower.
        **fields: Further fields of the language model's config.
    """
    paths = {"encoder": str(directory / "encoder"), "language_model": str(directory / "llm")}
    words = tiny_tokenizer(tokenizer)
    model = tiny_llm(llm, vocab_size=len(words) + spare_rows, tied=tied, **fields)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    model.save_pretrained(paths["language_model"])
    words.save_pretrained(paths["language_model"])
    tiny_encoder(encoder).save_pretrained(paths["encoder"])
    _image_processor().save_pretrained(paths["encoder"])
    parts = {"language_model": paths["language_model"], "image": {"encoder": paths["encoder"], **(image or {})}}
    if audio is not None:
        encoder = save_tiny_audio_encoder(directory / "audio_encoder", audio.get("encoder", "whisper"))
        parts["audio"] = {**audio, "encoder": encoder}
    if video is not None:
        parts["video"] = dict(video)
    return parts


def tiny_model(directory: Path, **parts) -> tuple[MllmForConditionalGeneration, MllmProcessor]:
    """An assembled model with its processor, out of `save_tiny_parts(directory, **parts)`."""
    return assemble(**save_tiny_parts(directory, **parts))


def save_tiny_rows(
    directory: Path, count: int = 12, *, num_images: Callable[[int], int] = lambda number: int(number % 3 > 0)
) -> Path:
    """Write rows about random images, with answers of unequal length, and return their JSONL file.

    Args:
        directory: Where `rows.jsonl` and `images` are made.
        count: How many rows.
        num_images: How many images the row of this number has; by default every third row is text alone.
    """
    (directory / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    rows = []
    for number in range(count):
        content: list[dict] = [{"type": "image"}] * num_images(number)
        media = []
        for item in range(num_images(number)):
            height, width = (int(side) for side in random.integers(10, 30, 2))
            name = f"images/{number}-{item}.png"
            Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(directory / name)
            media.append({"kind": "image", "path": name, "height": height, "width": width})
        question = {"role": "user", "content": [*content, {"type": "text", "text": f"What is number {number}?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "a red 3" + " and a 7" * (number % 5)}]}
        rows.append({"id": f"row-{number}", "source": "tiny", "messages": [question, answer], "media": media})
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _image_processor(side: int = 16) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
