"""Our side of a step of preference training: the program `train/rdpo.py` as it is, with clocks on what it calls."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from training_benchmark.our_side import load_program
from training_benchmark.process import cuda_peak_mib, memory_mib, start_counting_memory
from training_benchmark.steps import StepClock, watch_batches


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Train one epoch; returns the figures of this side."""
    program = load_program("rdpo")
    before = start_counting_memory()
    found: dict[str, Any] = {"pass_seconds": 0.0}
    ask = program.known_reference

    def asked(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        known = ask(*args, **kwargs)
        found["pass_seconds"] = time.perf_counter() - start
        return known

    program.known_reference = asked
    trainer_class = program.MultimodalDPOTrainer
    trainer_class.train_from = watched(trainer_class.train_from, found)
    trainer_class.save_final = lambda trainer: Path(spec["scratch"])  # TRL's side saves nothing either
    program.draw_preference = lambda *_: True
    config = Path(spec["scratch"], "config.yaml")
    config.write_text(yaml.safe_dump(options(spec)), encoding="utf-8")
    args = program.parse_arguments(["--config", str(config)], program.PreferenceArguments)
    program.run(args)
    trainer, seconds = found["trainer"], found["clock"].step_seconds
    logs = [entry for entry in trainer.state.log_history if "log_probs/chosen" in entry]
    return {
        "step_seconds": seconds,
        "train_seconds": found["train_seconds"],
        "pass_seconds": found["pass_seconds"],
        "rows_per_second": spec["pairs_of_a_step"] / seconds,
        "peak_mib": memory_mib("VmHWM") - before,
        "cuda_peak_mib": cuda_peak_mib(),
        "batches": found["batches"],
        "losses": [entry["loss"] for entry in logs],
        "log_probs": {side: [entry[f"log_probs/{side}"] for entry in logs] for side in ("chosen", "rejected")},
        "classes": [type(trainer).__name__, type(trainer.model.get_base_model()).__name__],
    }


def watched(train_from: Callable[..., Any], found: dict[str, Any]) -> Callable[..., Any]:
    """The trainer's own training, with what was seen of it put into `found`."""

    def call(trainer: Any, *args: Any) -> None:
        found.update(trainer=trainer, clock=StepClock())
        found["batches"] = watch_batches(trainer, lambda collated: collated.batch)
        trainer.add_callback(found["clock"])
        start = time.perf_counter()
        train_from(trainer, *args)
        found["train_seconds"] = time.perf_counter() - start

    return call


def options(spec: dict[str, Any]) -> dict[str, Any]:
    """What would stand in the file of such a run; dropout and checkpointing are off by themselves."""
    return {
        "model": spec["model"],
        "preset": spec["preset"],
        "beta": spec["beta"],
        "precompute_ref_log_probs": spec["precomputed"],
        "parts": {"text": {"mode": "lora", "rank": 16, "alpha": 32}},
        "data": [{"path": spec["rows"]}],
        "dtype": "float32",
        "max_length": None,
        "batching": "random",
        "per_device_train_batch_size": spec["pairs_of_a_step"],
        "per_device_eval_batch_size": spec["pairs_of_a_step"],
        "num_train_epochs": 1,
        "learning_rate": spec["learning_rate"],
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_num_workers": 0,
        "output_dir": os.path.join(spec["scratch"], "run"),
        "bf16": spec["bf16"],
    }
