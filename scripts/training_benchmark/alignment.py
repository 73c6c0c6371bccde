"""What a feature cache is worth when only the connector is trained, beside what it can be worth at most."""

import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionModel, Qwen2ForCausalLM

from mllm.assemble import assemble_checkpoint
from training_benchmark.checkpoints import IMAGE_SIZE, SHAPES, make_config, make_image_processor, make_tokenizer
from training_benchmark.mixture import make_mixture
from training_benchmark.process import ROOT, Trial

SPARED = ("decode", "preprocess", "encoder")
"""What a step with cached features does not do."""
ALIGNED = {"image.encoder": "frozen", "image.connector": "full", "text": "frozen"}


def compare(specs: dict[str, dict[str, Any]], trial: Trial, *, repeats: int) -> dict[str, Any]:
    """Measure each model without and with a cache, in turn; the key is the smaller of their shares of the bound."""
    models = {name: compare_one(spec, trial, repeats=repeats) for name, spec in specs.items()}
    reached = [model["of_bound"] for model in models.values() if model["of_bound"] is not None]
    return {"cached_alignment_of_bound": min(reached, default=None), "alignment": models}


def compare_one(spec: dict[str, Any], trial: Trial, *, repeats: int) -> dict[str, Any]:
    """One model. The bound is of the same runs that the speed without a cache is of."""
    cache = str(Path(spec["rows"]).parent / f"features-{Path(spec['model']).name}")
    shutil.rmtree(cache, ignore_errors=True)  # of an earlier run: what it costs to fill shall be seen
    plain, cached = [], []
    for _ in range(repeats):
        plain.append(trial(spec | {"shares": True}))
        cached.append(trial(spec | {"shares": True, "feature_cache": cache}))
    trials = {"uncached": plain, "cached": cached}
    if any("error" in one for one in (*plain, *cached)):
        return {"of_bound": None, "trials": trials}
    spared = statistics.median(sum(one["shares"][name] for name in SPARED) for one in plain)
    speed_up = statistics.median(one["train_seconds"] for one in plain) / statistics.median(
        one["train_seconds"] for one in cached
    )
    bound = 1 / (1 - spared)
    return {
        "of_bound": speed_up / bound,
        "speed_up": speed_up,
        "bound": bound,
        "spared_share": spared,
        "cache_fill_seconds": cached[0]["cache_seconds"],
        "trials": trials,
    }


def llava_spec(directory: Path, shape: str, num_rows: int) -> dict[str, Any]:
    """LLaVA's first stage: captions, and a composed model with a deeper encoder than the stock one's."""
    rows = make_mixture(directory / "captions", num_rows, shares={"caption": 1.0})
    model = directory / f"composed-{shape}"
    if not model.exists():
        parts = directory / f"parts-{shape}"
        save_parts(parts, SHAPES[shape], rows)
        assemble_checkpoint(
            model,
            language_model=str(parts / "llm"),
            image={"encoder": str(parts / "encoder")},
            chat_template="chatml",
        )
    return _spec(model, rows, num_rows, batch_rows=16)


def digits_spec(directory: Path, num_scenes: int) -> dict[str, Any]:
    """The quickstart's first stage: its data and backbones made by their own programs, the latter hardly trained."""
    data, parts, model = directory / "digits", directory / "digit-backbones", directory / "composed-digits"
    if not model.exists():
        few = ["--text_share", "0.02", "--eval_scenes", "8"]
        _run("data_recipes/digits.py", "--out", data, "--seed", 0, "--scenes", num_scenes, *few)
        short = ["--encoder_steps", 2, "--llm_steps", 2]
        _run("scripts/train_digit_backbones.py", "--data", data, "--out", parts, *short)
        assemble_checkpoint(
            model,
            language_model=str(parts / "llm"),
            image={"encoder": str(parts / "encoder"), "feature_layer": -1},
            chat_template="chatml",
        )
    return _spec(model, data / "places.jsonl", num_scenes, batch_rows=32)


def save_parts(directory: Path, shape: dict[str, Any], rows: Path) -> None:
    """An encoder and a language model as they would have been downloaded, with random weights."""
    tokenizer = make_tokenizer(rows)
    config = make_config(shape, tokenizer)
    torch.manual_seed(0)
    CLIPVisionModel(config.vision_config).save_pretrained(directory / "encoder")
    make_image_processor(IMAGE_SIZE).save_pretrained(directory / "encoder")
    llm = Qwen2ForCausalLM(config.text_config)
    llm.generation_config.eos_token_id = tokenizer.eos_token_id
    llm.generation_config.pad_token_id = tokenizer.pad_token_id
    llm.save_pretrained(directory / "llm")
    tokenizer.save_pretrained(directory / "llm")


def _spec(model: Path, rows: Path, num_rows: int, *, batch_rows: int) -> dict[str, Any]:
    return {
        "side": "our",
        "model": str(model),
        "rows": str(rows),
        "num_rows": num_rows,
        "parts": ALIGNED,
        "batching": "random",
        "batch_rows": batch_rows,
        "step_rows": batch_rows,
        "workers": 0,
        "learning_rate": 1e-3,
    }


def _run(program: str, *arguments: Any) -> None:
    subprocess.run([sys.executable, str(ROOT / program), *map(str, arguments)], check=True, capture_output=True)
