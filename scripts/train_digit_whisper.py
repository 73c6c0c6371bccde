"""Train the audio encoder that others download: a tiny Whisper, for the sounds of the digits world.

Its encoder learns to name, for every hundredth part of two seconds, whether something sounds, which of the things that
sound it is, how high, and how its pitch changes, in it or from the one before. The decoder that a Whisper checkpoint
also holds stays as it was initialised: nobody here uses it. From then on every program treats it as if it had
been downloaded.

    python scripts/train_digit_whisper.py --data runs/digits_sounds --out runs/backbones_audio
"""

import argparse
import json
import math
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from mllm.processing.audio import decode_audio

SECONDS = 2  # of a window
FEATURES = 50 * SECONDS  # Whisper has 50 a second
NUMBERS = 6  # of what sounds: 0 for silence, then the first, the second, ...
PITCHES, LOWEST, HIGHEST = 24, 260.0, 2000.0  # classes of pitch, and the range in hertz that they divide
CHANGES = 6  # of pitch: none before, the same as before, higher, lower; rising, falling
SECTIONS = (NUMBERS, PITCHES, CHANGES)
IGNORED = -100


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the audio encoder of the digits world.")
    parser.add_argument("--data", type=Path, required=True, help="directory written by data_recipes/digits_sounds.py")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must be absent or empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    if not (args.data / "tracks.jsonl").is_file():
        parser.error(f"--data {args.data} holds no tracks.jsonl: run data_recipes/digits_sounds.py first")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out {args.out} already holds files; name a new directory or remove it")

    torch.manual_seed(args.seed)
    unfinished = args.out.with_name(f"{args.out.name}.partial-{os.getpid()}")
    report = {"seed": args.seed, **train(args.data, unfinished, args.steps)}
    (unfinished / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.out.exists():
        args.out.rmdir()
    unfinished.rename(args.out)
    print(json.dumps(report, indent=2))


def train(data: Path, out: Path, steps: int) -> dict:
    """Train a Whisper encoder to name what sounds under each of its features, and save it with its decoder."""
    start = time.perf_counter()
    extractor = WhisperFeatureExtractor(feature_size=40, chunk_length=SECONDS)
    model = WhisperModel(
        WhisperConfig(
            vocab_size=64,
            num_mel_bins=extractor.feature_size,
            d_model=64,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=256,
            decoder_layers=1,
            decoder_attention_heads=4,
            decoder_ffn_dim=64,
            max_source_positions=FEATURES,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            decoder_start_token_id=1,
            begin_suppress_tokens=None,
        )
    )
    encoder, head = model.encoder, torch.nn.Linear(model.config.d_model, sum(SECTIONS))
    sounds, unseen = (read_tracks(data / name, extractor) for name in ("tracks.jsonl", "eval/tracks.jsonl"))

    def forward(batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return head(encoder(batch).last_hidden_state).flatten(0, 1).split(SECTIONS, dim=-1)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        logits, labels = forward(sounds[0][rows]), sounds[1][rows].movedim(1, 0).flatten(1)
        return sum(map(partial(cross_entropy, ignore_index=IGNORED), logits, labels), torch.zeros(()))

    optimise(torch.nn.ModuleDict({"encoder": encoder, "head": head}), loss, len(sounds[0]), steps)
    model.eval()
    with torch.no_grad():
        numbers, pitches, changes = (logits.argmax(-1) for logits in forward(unseen[0]))
    true_numbers, true_pitches, true_changes = unseen[1].movedim(1, 0).flatten(1)
    is_heard = true_pitches != IGNORED
    model.save_pretrained(out)
    extractor.save_pretrained(out)
    return {
        "steps": steps,
        "seconds": round(time.perf_counter() - start, 1),
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "unseen_number_accuracy": share(numbers[is_heard] == true_numbers[is_heard]),
        "unseen_silence_accuracy": share(numbers[~is_heard] == true_numbers[~is_heard]),
        "unseen_pitch_within_one_class": share((pitches - true_pitches)[is_heard].abs() <= 1),
        "unseen_change_accuracy": share(changes[is_heard] == true_changes[is_heard]),
    }


def read_tracks(path: Path, extractor: WhisperFeatureExtractor) -> tuple[torch.Tensor, ...]:
    """Spectra [N, mel bins, 2 * features], and what each feature is, see `name_moments` [N, 3, features]."""
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    rate = extractor.sampling_rate
    sounds = [
        decode_audio(path.parent / row["media"][0]["path"], sampling_rate=rate)[0]
        for row in tqdm(rows, desc=f"reading {path.name}", unit="sound", mininterval=1)
    ]
    spectra = [
        extractor(sounds[first : first + 256], sampling_rate=rate, return_tensors="pt")["input_features"]
        for first in range(0, len(sounds), 256)
    ]
    return torch.cat(spectra), torch.from_numpy(np.stack([name_moments(row["events"]) for row in rows]))


def name_moments(events: list[list[float]]) -> np.ndarray:
    """For the middle of each feature, [3, features]: which event sounds (none: 0), its pitch, and its change."""
    moments, before = (np.arange(FEATURES) + 0.5) * SECONDS / FEATURES, None
    labels = np.full((3, FEATURES), IGNORED)
    labels[0] = 0
    for number, (start, end, low, high) in enumerate(events, start=1):
        is_on = (start <= moments) & (moments < end)
        height = math.log(low) + (moments[is_on] - start) / (end - start) * math.log(high / low)
        place = (height - math.log(LOWEST)) / math.log(HIGHEST / LOWEST) * PITCHES
        labels[0, is_on], labels[1, is_on] = number, place.astype(int).clip(0, PITCHES - 1)
        labels[2, is_on] = name_change(before, low, high)
        before = high
    return labels


def name_change(before: float | None, low: float, high: float) -> int:
    """The class of an event that goes from one pitch to another, behind one that ended at a pitch."""
    if low != high:
        return 4 if low < high else 5
    if before is None or before == low:
        return 0 if before is None else 1
    return 2 if low > before else 3


def optimise(model: torch.nn.Module, loss, num_rows: int, steps: int) -> None:
    """AdamW over batches of 64 rows, with warm-up and, in the second half, decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05)
    warm_up, decay = max(1, steps // 20), max(1, steps // 2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / warm_up, 1, (steps - n) / decay))
    epochs = [torch.randperm(num_rows) for _ in range(64 * steps // num_rows + 1)]
    progress = tqdm(torch.cat(epochs).split(64)[:steps], desc="whisper", unit="step")
    for step, rows in enumerate(progress):
        value = loss(rows)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{value.item():.3f}")


def share(is_right: torch.Tensor) -> float:
    """The share of what is true, to four places."""
    return round(is_right.float().mean().item(), 4)


if __name__ == "__main__":
    main()
