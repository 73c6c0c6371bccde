"""TRL's side of a step of preference training: `DPOTrainer`, as its documentation has it used for images."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from peft import LoraConfig
from transformers import AutoProcessor, LlavaForConditionalGeneration
from trl import DPOConfig, DPOTrainer

from training_benchmark.process import cuda_peak_mib, memory_mib, start_counting_memory
from training_benchmark.steps import StepClock, watch_batches
from training_benchmark.trl_side import ADAPTER


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Train one epoch; returns the figures of this side. The reference is the model without its adapters."""
    before = start_counting_memory()
    trainer = make_trainer(spec)
    clock, batches = StepClock(), watch_batches(trainer, lambda batch: batch)
    trainer.add_callback(clock)
    start = time.perf_counter()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "logps/chosen" in entry]
    return {
        "step_seconds": clock.step_seconds,
        "train_seconds": time.perf_counter() - start,
        "rows_per_second": spec["pairs_of_a_step"] / clock.step_seconds,
        "peak_mib": memory_mib("VmHWM") - before,
        "cuda_peak_mib": cuda_peak_mib(),
        "batches": batches,
        "losses": [entry["loss"] for entry in logs],
        "log_probs": {side: [entry[f"logps/{side}"] for entry in logs] for side in ("chosen", "rejected")},
        "classes": [type(trainer).__name__, type(trainer.model.get_base_model()).__name__],
    }


def make_trainer(spec: dict[str, Any]) -> DPOTrainer:
    """A trainer with dropout and checkpointing off, and no limit of length, which would cut images."""
    config = DPOConfig(
        output_dir=spec["scratch"],
        per_device_train_batch_size=spec["pairs_of_a_step"],
        num_train_epochs=1,
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        beta=spec["beta"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_length=None,
        gradient_checkpointing=False,
        disable_dropout=True,
        bf16=spec["bf16"],
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=0,
        train_sampling_strategy="sequential",
    )
    model = LlavaForConditionalGeneration.from_pretrained(
        spec["model"], dtype=torch.float32, attn_implementation="sdpa"
    )
    return DPOTrainer(
        model=model,
        args=config,
        train_dataset=read_pairs(spec),
        processing_class=AutoProcessor.from_pretrained(spec["model"]),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=ADAPTER.target_modules, task_type="CAUSAL_LM"),
    )


def read_pairs(spec: dict[str, Any]) -> Dataset:
    """The pairs as TRL takes them, in the order that our side has them in; it puts images in front of the question."""
    path = Path(spec["rows"])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    records = [
        {
            "images": [str(path.parent / item["path"]) for item in row["media"]],
            "prompt": [{"role": "user", "content": row["messages"][0]["content"][-1]["text"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]["content"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]["content"]}],
        }
        for row in (rows[place] for place in spec["order"])
    ]
    return Dataset.from_list(records).cast_column("images", [Image()])
