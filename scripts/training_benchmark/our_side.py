"""Our side of a trial: the program `train/sft.py` as it is, with clocks on what it calls."""

import importlib.util
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml

from mllm import load_processor
from mllm.data import collate
from mllm.training import programs
from training_benchmark.process import ROOT, cuda_peak_mib, memory_mib, start_counting_memory
from training_benchmark.shares import time_parts, timed

STEPS = {"read_rows": "prepare", "encode_rows": "prepare", "trainable_model": "load", "encode_media": "cache"}
"""Functions that run before `train/sft.py` trains, by their names in `mllm.training.programs`, and what their time
counts as. What is done about the rows counts as on TRL's side, where its trainer's constructor does the like."""


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Train over the rows, one epoch unless the spec says otherwise; returns the figures of this side."""
    program = load_program()
    before = start_counting_memory()
    clock: dict[str, float] = defaultdict(float)
    for name, step in STEPS.items():
        setattr(programs, name, timed(getattr(programs, name), clock, step))
    found: dict[str, Any] = {}
    program.SftTrainer.train_from = watched(program.SftTrainer.train_from, spec, found)
    program.SftTrainer.save_final = lambda trainer: Path(spec["scratch"])  # TRL's side saves nothing either
    config = Path(spec["scratch"], "config.yaml")
    config.write_text(yaml.safe_dump(options(spec)), encoding="utf-8")
    start = time.perf_counter()
    program.run(program.parse_arguments(["--config", str(config)]))
    whole = time.perf_counter() - start
    trainer, training = found["trainer"], found["seconds"]
    return {
        "load_seconds": clock["load"],
        "prepare_seconds": clock["prepare"],
        "cache_seconds": clock["cache"],
        "other_seconds": whole - training - clock["load"] - clock["prepare"] - clock["cache"],
        "train_seconds": training,
        "train_cpu_seconds": found["cpu"],
        "rows_per_second": spec["num_rows"] * spec.get("epochs", 1) / (clock["prepare"] + training),
        "peak_mib": found["peak"] - before,
        "cuda_peak_mib": cuda_peak_mib(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "optimizer_steps": trainer.state.global_step,
        "shares": None if found["shares"] is None else found["shares"](training),
        "classes": [type(trainer).__name__, type(trainer.model).__name__, type(trainer.processor).__name__],
    }


def load_program(name: str = "sft") -> ModuleType:
    """A program in `train/` as a module, with all that it imports."""
    path = ROOT / "train" / f"{name}.py"
    found = importlib.util.spec_from_file_location(f"{name}_program", path)
    program = importlib.util.module_from_spec(found)
    found.loader.exec_module(program)
    return program


def watched(train_from: Callable[..., Any], spec: dict[str, Any], found: dict[str, Any]) -> Callable[..., Any]:
    """The trainer's own training, with its seconds and the peak of memory at its end put into `found`."""

    def call(trainer: Any, *args: Any) -> None:
        found["trainer"] = trainer
        found["shares"] = time_parts(trainer, media_functions(trainer)) if spec.get("shares") else None
        start, cpu_start = time.perf_counter(), time.process_time()
        train_from(trainer, *args)
        found["seconds"], found["cpu"] = time.perf_counter() - start, time.process_time() - cpu_start
        found["peak"] = memory_mib("VmHWM")

    return call


def media_functions(trainer: Any) -> dict[str, list[tuple[Any, str]]]:
    """Where our side decodes an image, and makes the encoder's input of it."""
    processor = type(trainer.processor)
    encoders = [name for name in ("encode_media", "encode_images") if name in dir(processor)]
    decoders = [name for name in ("decode_image", "read_media_bytes") if name in dir(collate)]
    return {
        "decode": [(collate, name) for name in decoders],
        "preprocess": [(processor, name) for name in encoders],
    }


def options(spec: dict[str, Any]) -> dict[str, Any]:
    """What would stand in the file of such a run."""
    text = {"mode": "lora", "rank": 16, "alpha": 32} if spec.get("mode") == "lora" else "full"
    chosen: dict[str, Any] = {
        "model": spec["model"],
        "parts": spec.get("parts") or {"image.encoder": "frozen", "image.connector": "full", "text": text},
        "data": [{"path": spec["rows"]}],
        "dtype": spec.get("dtype", "float32"),
        "max_length": None,
        "batching": spec["batching"],
        "gradient_accumulation_steps": accumulation(spec),
        "num_train_epochs": spec.get("epochs", 1),
        "learning_rate": spec["learning_rate"],
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_num_workers": spec["workers"],
        "output_dir": os.path.join(spec["scratch"], "run"),
        "feature_cache": spec.get("feature_cache"),
        "bf16": spec.get("bf16", False),
    }
    if spec["batching"] == "packed":
        return chosen | {"pack_length": spec["pack_length"]}
    return chosen | {"per_device_train_batch_size": spec["batch_rows"]}


def accumulation(spec: dict[str, Any]) -> int:
    """Micro-batches of a step, so that a step has about `step_rows` rows, in packs as in rows."""
    if spec["batching"] == "packed":
        rows_of_a_pack = spec["pack_length"] / spec["mean_tokens"]
        return max(1, math.floor(spec["step_rows"] / rows_of_a_pack + 0.5))
    return max(1, spec["step_rows"] // spec["batch_rows"])


def encoded_rows(
    spec: dict[str, Any], *, num_epochs: int
) -> tuple[list[tuple[list[int], list[int]]], list[tuple[str, int]], list[list[int]]]:
    """Ids and labels of every row, its source and number of images, and the orders of `batching: random` by epoch."""
    program = load_program()
    config = Path(spec["scratch"], "config.yaml")
    config.write_text(yaml.safe_dump(options(spec)), encoding="utf-8")
    args = program.parse_arguments(["--config", str(config)])
    rows = programs.read_rows(args, progress=lambda *_: lambda *_: None)
    examples = programs.encode_rows(rows, args, load_processor(spec["model"]), progress=lambda *_: lambda *_: None)
    encoded = [examples[place] for place in range(len(examples))]
    pairs = [(example.input_ids.tolist(), example.labels.tolist()) for example in encoded]
    facts = [(example.row.source, len(example.row.media)) for example in encoded]
    return pairs, facts, [examples.order(epoch, args.seed).tolist() for epoch in range(num_epochs)]
