"""Train the two parts that others download: a tiny CLIP vision encoder and a tiny Llama, for the digits world.

The encoder learns to name what stands in the cell of each patch, and where that is. The language model, with its own
tokenizer, learns to answer questions about scenes that are written out as text. Neither has ever met the other's data.
Both are saved as ordinary checkpoints; from then on every program treats them as if they had been downloaded.

    python scripts/train_digit_backbones.py --data runs/digits --out runs/backbones
"""

import argparse
import json
import math
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from digit_backbones.batched_muon import Muon
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

CELL = 16  # pixels of a cell of the canvas
PATCH = 16
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white")
SPARE_ROWS = 16  # embedding rows that no token uses yet: room for a placeholder
HELD_OUT = 400  # conversations, the last ones, that the language model is tested on
IGNORED = -100
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the encoder and the language model of the digits world.")
    parser.add_argument("--data", type=Path, required=True, help="directory written by data_recipes/digits.py")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must be absent or empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoder_steps", type=int, default=500)
    parser.add_argument(
        "--class_weight", type=float, default=0.0,
        help="weight of a loss that teaches the class token which digits and colours are in the picture; without it "
        "its last layer learns nothing, and what ranks patches by its attention (VisionDrop, VisionZip) ranks poorly",
    )  # fmt: skip
    parser.add_argument("--llm_steps", type=int, default=2000, help="at most, in each phase")
    lessons = "further lessons for the language model, see `read_lessons`"
    parser.add_argument("--lessons", type=Path, nargs="*", default=[], metavar="FILE", help=lessons)
    args = parser.parse_args()
    if not (args.data / "recipe.json").is_file():
        parser.error(f"--data {args.data} holds no recipe.json: run data_recipes/digits.py --out {args.data} first")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out {args.out} already holds files; name a new directory or remove it")

    torch.manual_seed(args.seed)
    partial = args.out.with_name(f"{args.out.name}.partial-{os.getpid()}")
    report = {
        "seed": args.seed,
        "encoder": train_encoder(args.data, partial / "encoder", args.encoder_steps, args.class_weight),
        "llm": train_llm([args.data / "text.jsonl", *args.lessons], partial / "llm", args.llm_steps),
    }
    report["parameters"] = {name: report[name]["parameters"] for name in ("encoder", "llm")}
    (partial / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.out.exists():
        args.out.rmdir()
    partial.rename(args.out)
    print(json.dumps(report, indent=2))


# The encoder


def train_encoder(data: Path, out: Path, steps: int, class_weight: float) -> dict:
    """Train a CLIP vision tower to name digit, colour and place of the cell under each patch, and save it.

    With a `class_weight` its class token learns which digits and colours there are, as captions teach a CLIP's.
    """
    start = time.perf_counter()
    side = CELL * read_grid(data / "cells.jsonl")
    processor = CLIPImageProcessorPil(
        size={"height": side, "width": side},
        do_center_crop=False,
        image_mean=[0.25] * 3,
        image_std=[0.25] * 3,
    )
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=side,
        patch_size=PATCH,
        projection_dim=128,
    )
    encoder = CLIPVisionModel(config)
    sections = [11, len(COLOURS), config.image_size**2 // config.patch_size**2]
    head = torch.nn.Linear(config.hidden_size, sum(sections))
    class_head = torch.nn.Linear(config.hidden_size, 10 + len(COLOURS)) if class_weight else None
    pixels, digits, colours = read_cells(data / "cells.jsonl", processor, config)
    pixels_unseen, digits_unseen, colours_unseen = read_cells(data / "eval/cells.jsonl", processor, config)

    def forward(batch: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        features = encoder(pixel_values=batch, output_hidden_states=True).hidden_states[-1]
        return head(features[:, 1:]).flatten(0, 1).split(sections, dim=-1), features[:, 0]

    def loss(rows: torch.Tensor) -> torch.Tensor:
        (digit_logits, colour_logits, place_logits), class_token = forward(pixels[rows])
        digit_loss = cross_entropy(digit_logits, digits[rows].flatten())
        colour_loss = cross_entropy(colour_logits, colours[rows].flatten(), ignore_index=IGNORED)
        # Nothing but this keeps the place in the features: without it they forget where a patch was, which an encoder
        # of photographs never can. A weight of 0.02 is too little for it.
        places = torch.arange(sections[-1]).repeat(len(rows))
        patches_loss = digit_loss + colour_loss + 0.3 * cross_entropy(place_logits, places)
        if class_head is None:
            return patches_loss
        there = torch.cat([mentioned(digits[rows], 10), mentioned(colours[rows], len(COLOURS))], dim=-1)
        return patches_loss + class_weight * binary_cross_entropy_with_logits(class_head(class_token), there)

    epochs = [torch.randperm(len(pixels)) for _ in range(128 * steps // len(pixels) + 1)]
    batches = torch.cat(epochs).split(128)[:steps]
    trained = torch.nn.ModuleList(module for module in (encoder, head, class_head) if module)
    optimise(trained, (lambda batch=batch: loss(batch) for batch in batches), steps, "encoder")

    encoder.eval()
    with torch.no_grad():
        (digit_logits, colour_logits, place_logits), _ = forward(pixels_unseen)
    is_filled = colours_unseen.flatten() != IGNORED
    encoder.save_pretrained(out)
    processor.save_pretrained(out)
    return {
        "steps": steps,
        "seconds": round(time.perf_counter() - start, 1),
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "unseen_digit_accuracy": accuracy(digit_logits[is_filled], digits_unseen.flatten()[is_filled]),
        "unseen_empty_accuracy": accuracy(digit_logits[~is_filled], digits_unseen.flatten()[~is_filled]),
        "unseen_colour_accuracy": accuracy(colour_logits[is_filled], colours_unseen.flatten()[is_filled]),
        "unseen_place_accuracy": accuracy(place_logits, torch.arange(sections[-1]).repeat(len(pixels_unseen))),
    }


def mentioned(labels: torch.Tensor, num_names: int) -> torch.Tensor:
    """Which names some patch of a picture has: labels [B, patches], of which others are no names, to [B, names]."""
    is_there = labels[..., None] == torch.arange(num_names)
    return is_there.any(dim=1).float()


def read_grid(path: Path) -> int:
    """How many cells the canvas has along a side."""
    with path.open(encoding="utf-8") as lines:
        return math.isqrt(len(json.loads(lines.readline())["digits"]))


def read_cells(path: Path, processor: CLIPImageProcessorPil, config: CLIPVisionConfig) -> tuple[torch.Tensor, ...]:
    """Pixels [N, 3, side, side]; of each patch [N, patches] the digit (empty: 10) and the colour (empty: IGNORED)."""
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    images = [np.asarray(Image.open(path.parent / row["media"][0]["path"])) for row in rows]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    pixels = pixels.mul_(processor.rescale_factor).sub_(mean).div_(std)
    digits = [[10 if digit is None else digit for digit in row["digits"]] for row in rows]
    colours = [[IGNORED if name is None else COLOURS.index(name) for name in row["colours"]] for row in rows]

    def to_patches(cells: list[list[int]]) -> torch.Tensor:
        side = math.isqrt(len(cells[0]))
        per_cell = config.image_size // config.patch_size // side
        grid = torch.tensor(cells).view(len(cells), side, side)
        return grid.repeat_interleave(per_cell, 1).repeat_interleave(per_cell, 2).flatten(1)

    return pixels, to_patches(digits), to_patches(colours)


# The language model


def train_llm(lessons: list[Path], out: Path, steps: int) -> dict:
    """Train a tokenizer and a Llama on conversations about scenes written out as text, and save both."""
    start = time.perf_counter()
    *phases, held_out = read_lessons(lessons)
    rows = [row for phase in [*phases, held_out] for row in phase]
    chats = [
        [{"role": message["role"], "content": message["content"][0]["text"]} for message in row["messages"]]
        for row in rows
    ]
    tokenizer = train_tokenizer(message["content"] for chat in chats for message in chat)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + SPARE_ROWS,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # conversations are short
        initializer_range=128**-0.5,  # the usual 0.02 is for wide models: here it costs hundreds of steps
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    llm = LlamaForCausalLM(config)
    compose_embeddings(llm, tokenizer)

    def loss(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # No mask: the padding is on the right, where a causal model never looks.
        hidden = llm.model(input_ids=input_ids, use_cache=False).last_hidden_state
        wanted = labels[:, 1:] != IGNORED
        return cross_entropy(llm.lm_head(hidden[:, :-1][wanted]), labels[:, 1:][wanted])

    encoded = tokenizer.apply_chat_template(chats, return_dict=True, return_assistant_tokens_mask=True)
    input_ids, labels = to_tensors(encoded["input_ids"], encoded["assistant_masks"], tokenizer.pad_token_id)
    start_of_phase, num_steps = 0, 0
    for number, phase in enumerate(phases):
        taken = slice(start_of_phase, start_of_phase + len(phase))
        batches = make_batches(input_ids[taken], labels[taken], batch_size=32)[:steps]
        losses = (lambda batch=batch: loss(*batch) for batch in batches)
        optimise(llm, losses, len(batches), f"llm, phase {number + 1}")
        start_of_phase, num_steps = taken.stop, num_steps + len(batches)

    llm.eval()
    tasks = [row["meta"]["tasks"][0] for row in held_out]  # one question each in the last lesson
    first = len(rows) - len(held_out)
    llm.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    llm.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {
        "steps": num_steps,
        "seconds": round(time.perf_counter() - start, 1),
        "parameters": sum(p.numel() for p in llm.parameters()),
        "vocabulary": len(tokenizer),
        "held_out_answers_right": {
            task: right_answers(llm, input_ids, labels, [first + n for n, name in enumerate(tasks) if name == task])
            for task in sorted(set(tasks))
        },
    }


def read_lessons(paths: list[Path]) -> list[list[dict]]:
    """The rows in phases, each learned with a schedule of its own, and behind them those that are held out.

    The first file is a phase by itself: what it teaches is learned late, and not at all among other things. The others
    are the second phase, in step with each other and with every other row of the first file's second half, which
    keeps what was learned.
    """
    files, unseen = [], []
    for path in paths:
        found = [json.loads(line) for line in path.open(encoding="utf-8")]
        kept = len(found) - min(HELD_OUT, len(found) // 10)
        files.append(found[:kept])
        unseen += found[kept:]
    first, *others = files
    if not others:
        return [first, unseen]
    sources = [*others, first[len(first) // 2 :: 2]]
    moments = [
        (place / len(rows), number, row) for number, rows in enumerate(sources) for place, row in enumerate(rows)
    ]
    return [first, [row for *_, row in sorted(moments, key=lambda moment: moment[:2])], unseen]


def compose_embeddings(llm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Let tokens that share a word or a digit start alike: `TopLeftRed5` as `top` + `left` + `red` + `5`."""
    embeddings, scale, words = llm.model.embed_tokens.weight.data, llm.config.initializer_range, {}
    for token in range(len(tokenizer)):
        parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]|[^\sA-Za-z0-9]+", tokenizer.decode([token]))
        for part in parts:
            words.setdefault(part.lower(), scale * torch.randn(embeddings.shape[1]))
        if parts:
            embeddings[token] *= 0.1
            embeddings[token] += sum(words[part.lower()] for part in parts)
    llm.lm_head.weight.data.copy_(embeddings)


def make_batches(input_ids: torch.Tensor, labels: torch.Tensor, *, batch_size: int) -> list[tuple[torch.Tensor, ...]]:
    """Batches of rows of similar length, cut behind the last label. The order of the lessons is kept."""
    lengths = (labels != IGNORED).float().cumsum(1).argmax(1)
    batches = []
    for chunk in torch.arange(len(input_ids)).split(16 * batch_size):
        alike = chunk[lengths[chunk].argsort()].split(batch_size)
        for i in torch.randperm(len(alike)).tolist():
            width = int(lengths[alike[i]].max()) + 1
            batches.append((input_ids[alike[i], :width], labels[alike[i], :width]))
    return batches


@torch.no_grad()
def right_answers(llm: LlamaForCausalLM, input_ids: torch.Tensor, labels: torch.Tensor, rows: list[int]) -> float:
    """Share of the conversations whose every answer token is the likeliest one."""
    predicted = llm(input_ids=input_ids[rows]).logits[:, :-1].argmax(-1)
    is_right = (predicted == labels[rows, 1:]) | (labels[rows, 1:] == IGNORED)
    return round(is_right.all(1).float().mean().item(), 4)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE. Letters and digits may stand in one token, so that a cell such as `TopLeftRed5` becomes one."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[A-Za-z0-9]+| ?[^\sA-Za-z0-9]+|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def to_tensors(ids: list[list[int]], masks: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right. Labels are the assistant's tokens; all else is IGNORED."""
    width = max(map(len, ids))
    input_ids, labels = torch.full((len(ids), width), pad), torch.full((len(ids), width), IGNORED)
    for row, (tokens, mask) in enumerate(zip(ids, masks, strict=True)):
        tokens, mask = torch.tensor(tokens), torch.tensor(mask)
        input_ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = torch.where(mask == 1, tokens, IGNORED)
    return input_ids, labels


# Both


def optimise(model: torch.nn.Module, losses: Iterable, steps: int, name: str) -> None:
    """Muon for the matrices of the layers, AdamW for all else, with warm-up and, in the last third, decay.

    With AdamW alone it was a matter of luck, that is of the seed, whether the language model learned what a place is.

    Args:
        model: What is trained.
        losses: A function a step, which returns the loss.
        steps: How many.
        name: For the progress bar.
    """
    named = dict(model.named_parameters())
    matrices = {key: weight for key, weight in named.items() if ".layers." in key and weight.ndim == 2}
    others = [weight for key, weight in named.items() if key not in matrices]
    settings: dict = {"weight_decay": 0.05}
    optimizers = (
        Muon(list(matrices.values()), lr=4e-3, **settings),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), **settings),
    )
    warm_up, decay = max(1, steps // 20), max(1, steps // 3)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / warm_up, 1, (steps - n) / decay))
        for optimizer in optimizers
    ]
    progress = tqdm(losses, desc=name, unit="step", total=steps)
    for step, loss in enumerate(progress):
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{value.item():.3f}")


def accuracy(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Share of rows whose best logit is the target, to four places."""
    return round((logits.argmax(-1) == targets).float().mean().item(), 4)


if __name__ == "__main__":
    main()
