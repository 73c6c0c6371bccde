"""What the programs that train the digits world's parts learn from: labels of sounds, and the order of lessons."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModel

ROOT = Path(__file__).parents[2]
SILENT, NONE = 0, -100
SMALL = {
    "data_recipes/digits.py": "--out DIR/data --scenes 60 --text_share 0.01 --eval_scenes 4",
    "data_recipes/digits_videos.py": "--world DIR/data --out DIR/videos --videos 40 --lessons 40 --eval_videos 4",
    "data_recipes/digits_sounds.py": "--world DIR/data --out DIR/sounds --sounds 30 --both 20 "
    "--lessons 40 --eval_sounds 4",
    "scripts/train_digit_backbones.py": "--data DIR/data --out DIR/backbones --encoder_steps 2 --llm_steps 3 "
    "--lessons DIR/videos/lessons.jsonl DIR/sounds/lessons.jsonl",
    "scripts/train_digit_whisper.py": "--data DIR/sounds --out DIR/whisper --steps 2",
    "train/run.py": "train/configs/quickstart_modalities.yaml --output_dir DIR/run --data_root DIR --set "
    "model.image.encoder=DIR/backbones/encoder model.audio.encoder=DIR/whisper model.language_model=DIR/backbones/llm "
    "stages.align.max_steps=2 stages.sft.max_steps=2",
    "scripts/inspect_data.py": "show --data DIR/videos/videos.jsonl DIR/sounds/both.jsonl --model DIR/run/sft/final "
    "--rows 3 --html DIR/rows.html",
    "scripts/evaluate_model.py": "DIR/run/sft/final --rows DIR/data/eval DIR/videos/eval DIR/sounds/eval "
    "--out DIR/evaluation.json --tasks caption motion order beeps glide tones match",
}
"""The quickstart with all modalities, step by step, small enough to be run and far too small to learn anything."""

SPREAD = {
    "data_recipes/digits.py": "--out DIR/data --scenes 60 --text_share 0.01 --eval_scenes 4 --spread 2",
    "scripts/train_digit_backbones.py": "--data DIR/data --out DIR/backbones --encoder_steps 2 --llm_steps 3 "
    "--class_weight 1",
    "train/run.py": "train/configs/digits_pruning.yaml --output_dir DIR/run --data_root DIR/data --set "
    "model.image.encoder=DIR/backbones/encoder model.language_model=DIR/backbones/llm "
    "stages.align.max_steps=2 stages.sft.max_steps=2",
    "scripts/evaluate_model.py": "DIR/run/sft/final --rows DIR/data/eval --out DIR/evaluation.json --no_blank "
    "--pruner visiondrop tokens=12",
}
"""The digits world for pruners, as docs/pruning.md has it, as small."""


@pytest.fixture(scope="module")
def whisper():
    return runpy.run_path(str(ROOT / "scripts" / "train_digit_whisper.py"))


@pytest.fixture(scope="module")
def backbones():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        return runpy.run_path(str(ROOT / "scripts" / "train_digit_backbones.py"))


def test_moments_are_named_by_what_sounds_at_them(whisper):
    """Each of 20 ms, by its middle: 400 Hz from 0.1 s to 0.2 s, then a glide from 500 Hz to 250 Hz."""
    number, height, change = whisper["name_moments"]([[0.1, 0.2, 400.0, 400.0], [0.5, 1.0, 500.0, 250.0]])
    assert number.tolist() == [SILENT] * 5 + [1] * 5 + [SILENT] * 15 + [2] * 25 + [SILENT] * 50
    classes = np.log(np.array([400, 500]) / 260) / np.log(2000 / 260) * 24
    assert height[5:10].tolist() == [int(classes[0])] * 5
    assert height[25] == int(classes[1]) and height[49] == 0 and (np.diff(height[25:50]) <= 0).all()
    assert change[5:10].tolist() == [0] * 5 and change[25:50].tolist() == [5] * 25
    for labels in (height, change):
        assert (labels[number == SILENT] == NONE).all() and (labels[number != SILENT] >= 0).all()


@pytest.mark.parametrize(
    ("before", "low", "high", "change"),
    [(None, 5, 5, 0), (5, 5, 5, 1), (4, 5, 5, 2), (6, 5, 5, 3), (None, 5, 6, 4), (9, 6, 5, 5)],
)
def test_a_change_of_pitch_has_a_class(whisper, before, low, high, change):
    assert whisper["name_change"](before, low, high) == change < whisper["CHANGES"]


def test_batched_muon_is_torchs(backbones):
    torch.manual_seed(0)
    shapes = [(16, 16), (32, 16), (16, 16), (16, 32)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    optimizers = (
        backbones["Muon"](ours, lr=0.01, weight_decay=0.05),
        torch.optim.Muon(theirs, lr=0.01, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(5):
        for weight, other in zip(ours, theirs, strict=True):
            weight.grad = torch.randn_like(weight)
            other.grad = weight.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for weight, other in zip(ours, theirs, strict=True):
        moved = (other - 1).norm()
        assert moved > 0.1
        assert (weight - other).norm() < 0.02 * moved  # orthogonal up to bfloat16, in both


def test_further_lessons_come_after_the_first_and_with_a_part_of_it(backbones, tmp_path):
    paths = [tmp_path / "text.jsonl", tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for path, count in zip(paths, (100, 40, 5), strict=True):
        path.write_text("".join(json.dumps([path.stem, number]) + "\n" for number in range(count)))
    alone, held_out = backbones["read_lessons"](paths[:1])
    assert alone == [["text", number] for number in range(90)]
    assert held_out == [["text", number] for number in range(90, 100)]

    first, second, held_out = backbones["read_lessons"](paths)
    assert first == alone
    assert held_out == [["text", n] for n in range(90, 100)] + [["one", n] for n in range(36, 40)]
    for name, numbers in (("one", range(36)), ("two", range(5)), ("text", range(45, 90, 2))):
        assert [row for row in second if row[0] == name] == [[name, number] for number in numbers]
        places = [place / len(second) for place, (found, _) in enumerate(second) if found == name]
        assert all(abs(place - n / len(places)) < 0.05 for n, place in enumerate(places))  # in step with the others


def test_the_class_token_learns_which_names_are_there(backbones):
    """Of two pictures with three patches: a 2 twice, and nothing else but empty cells; a 0 and a 1."""
    found = backbones["mentioned"](torch.tensor([[2, 10, 2], [1, 0, 10]]), 3)
    assert found.tolist() == [[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    assert backbones["mentioned"](torch.tensor([[NONE, NONE]]), 2).tolist() == [[0.0, 0.0]]


def run_small(steps: dict[str, str], directory: Path) -> None:
    for program, options in steps.items():
        words = options.replace("DIR", str(directory)).split()
        seed = ["--seed", "0"] if "digit" in program else []
        run = subprocess.run([sys.executable, ROOT / program, *words, *seed], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_spread_out_digits_from_data_to_scores(tmp_path):
    run_small(SPREAD, tmp_path)
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert [(case["tokens"], case["of"]) for case in report["pruned"]] == [(12, 36)]
    assert CLIPVisionModel.from_pretrained(tmp_path / "backbones/encoder").config.image_size == 96


@pytest.mark.slow
def test_all_modalities_from_data_to_scores(tmp_path):
    run_small(SMALL, tmp_path)
    assert (tmp_path / "rows.html").stat().st_size > 1000
    scores = json.loads((tmp_path / "evaluation.json").read_text())["tasks"]
    assert {"motion", "match"} < set(scores) and all(
        0 <= v <= 1 for one in scores.values() for v in one["model"].values()
    )
