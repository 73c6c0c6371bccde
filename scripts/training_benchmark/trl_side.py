"""TRL's side of a trial: `SFTTrainer`, as its documentation has it used for images."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from peft import LoraConfig
from transformers import AutoProcessor, LlavaForConditionalGeneration
from trl import SFTConfig, SFTTrainer

from training_benchmark.process import cuda_peak_mib, memory_mib, start_counting_memory
from training_benchmark.shares import time_parts

ADAPTER = LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
    modules_to_save=["multi_modal_projector"],
    task_type="CAUSAL_LM",
)
"""The language model's linear layers, and the whole connector: what our side trains as `text: lora`."""


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Train over the rows, one epoch unless the spec says otherwise; returns the figures of this side."""
    before = start_counting_memory()
    start = time.perf_counter()
    model = load(spec)
    loading = time.perf_counter() - start
    start = time.perf_counter()
    trainer = make_trainer(spec, model)
    images = type(trainer.processing_class.image_processor)
    media = {"decode": [(Image, "decode_example")], "preprocess": [(images, "preprocess")]}
    parts = time_parts(trainer, media) if spec.get("shares") else None
    preparing = time.perf_counter() - start
    start, cpu_start = time.perf_counter(), time.process_time()
    trainer.train()
    training, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "load_seconds": loading,
        "prepare_seconds": preparing,
        "train_seconds": training,
        "train_cpu_seconds": cpu,
        "rows_per_second": spec["num_rows"] * spec.get("epochs", 1) / (preparing + training),
        "peak_mib": memory_mib("VmHWM") - before,
        "cuda_peak_mib": cuda_peak_mib(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "optimizer_steps": trainer.state.global_step,
        "shares": None if parts is None else parts(training),
        "classes": [type(trainer).__name__, type(model).__name__, type(trainer.processing_class).__name__],
    }


def load(spec: dict[str, Any]) -> LlavaForConditionalGeneration:
    """The model, its encoder frozen as LLaVA's second stage has it."""
    model = LlavaForConditionalGeneration.from_pretrained(
        spec["model"], dtype=torch.float32, attn_implementation="sdpa"
    )
    model.model.vision_tower.requires_grad_(False)
    return model


def make_trainer(spec: dict[str, Any], model: LlavaForConditionalGeneration) -> SFTTrainer:
    """A trainer whose micro-batches have `batch_rows` rows, and whose steps have `step_rows`."""
    grouped = spec.get("sampling") == "group_by_length"
    config = SFTConfig(
        output_dir=spec["scratch"],
        per_device_train_batch_size=spec["batch_rows"],
        gradient_accumulation_steps=max(1, spec["step_rows"] // spec["batch_rows"]),
        num_train_epochs=spec.get("epochs", 1),
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_length=None,
        assistant_only_loss=True,
        gradient_checkpointing=False,
        bf16=spec.get("bf16", False),
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=spec["workers"],
        train_sampling_strategy=spec.get("sampling", "random"),
        remove_unused_columns=not grouped,
    )
    return SFTTrainer(
        model=model,
        args=config,
        train_dataset=read_rows(spec, with_lengths=grouped),
        processing_class=AutoProcessor.from_pretrained(spec["model"]),
        peft_config=ADAPTER if spec.get("mode") == "lora" else None,
    )


def read_rows(spec: dict[str, Any], *, with_lengths: bool = False) -> Dataset:
    """The rows as TRL takes them: `messages`, and `images` that `datasets` decodes when a row is asked for."""
    path = Path(spec["rows"])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if spec.get("order"):
        rows = [rows[place] for place in spec["order"]]
    records = [
        {
            "messages": [{"role": turn["role"], "content": _text(turn)} for turn in row["messages"]],
            "images": [str(path.parent / item["path"]) for item in row["media"]],
        }
        for row in rows
    ]
    if with_lengths:  # TRL does not measure rows with images: the lengths are ours, and are given to it for nothing
        records = [record | {"length": length} for record, length in zip(records, spec["lengths"], strict=True)]
    return Dataset.from_list(records).cast_column("images", [Image()])


def _text(turn: dict[str, Any]) -> str:
    """A turn's words; TRL itself puts a row's images in front of its first question."""
    return "".join(item["text"] for item in turn["content"] if item["type"] == "text")


def supervised_rows(spec: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of every row, alone in a batch, as TRL's collator makes them."""
    trainer = make_trainer(spec | {"batch_rows": 1, "step_rows": 1, "workers": 0}, load(spec))
    batches = [trainer.data_collator([trainer.train_dataset[place]]) for place in range(len(trainer.train_dataset))]
    return [(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()) for batch in batches]
