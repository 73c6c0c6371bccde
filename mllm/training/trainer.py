"""What every training of ours shares: batches, parts, the loss's divisor, checkpoints."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from mllm.checkpoints import atomic_directory, mark_complete
from mllm.data.collate import PaddingCollator
from mllm.data.examples import Examples
from mllm.data.sampler import EpochDataLoader, RankBatches
from mllm.models.parts import PartOptions, learning_rate_groups
from mllm.processing import MllmProcessor
from mllm.training.arguments import SftArguments
from mllm.training.checkpoint import FINAL, PREFIX, remove_old, write_weights


class MllmTrainer(Trainer):
    """transformers' loop around our batches, parts and checkpoints. Subclasses say what the loss is.

    Args:
        model: With its modes applied.
        args: The run's options.
        examples: What to train on.
        processor: Saved with every checkpoint.
        parts: How each part is trained.
        base: Directory of the model the run started from.
        record: Content of the checkpoints' `run.json`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: SftArguments,
        *,
        examples: Examples,
        processor: MllmProcessor,
        parts: Mapping[str, PartOptions],
        base: Path,
        record: dict[str, Any],
    ):
        super().__init__(
            model=model,
            args=args,
            train_dataset=examples,
            data_collator=PaddingCollator(processor),
            callbacks=[JsonLog()],
        )
        # The count of supervised tokens of the whole global batch is what the loss is divided by. Trainer looks for
        # it in the signature of the model's forward, which PEFT hides.
        self.model_accepts_loss_kwargs = True
        # Not transformers' `processing_class`: it would set the model's end tokens back to the tokenizer's.
        self.processor = processor
        self.parts = dict(parts)
        self.base = base
        self.record = record

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro-batches. They are planned for all ranks together, so accelerate has nothing to shard."""
        batches = RankBatches(
            len(self.train_dataset),
            batch_size=self.args.per_device_train_batch_size,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            seed=self.args.seed,
        )
        workers = self.args.dataloader_num_workers
        return EpochDataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.args.device.type == "cuda",
        )

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """One group for each part and decay, each with its own learning rate."""
        if self.optimizer is None:
            groups = learning_rate_groups(
                self.model,
                self.parts,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
            )
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: transformers' estimate knows nothing of towers, and walks the whole model at every step."""
        return 0

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write weights and processor, and no pickled arguments. transformers calls this wherever it saves a model."""
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        home = Path(self.args.output_dir) / directory.name
        write_weights(directory, model, self.processor, self.record, base=self.base, home=home, state_dict=state_dict)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write the checkpoint aside, and give it its name when it is complete."""
        name = f"{PREFIX}{self.state.global_step}"
        output_dir = Path(self.args.output_dir)
        aside = output_dir / f"{name}.partial"
        if self.is_world_process_zero():
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._get_output_dir = lambda trial: str(aside)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            del self._get_output_dir
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            mark_complete(aside / name, kind="checkpoint", facts={"step": self.state.global_step})
            os.rename(aside / name, output_dir / name)
            aside.rmdir()
            remove_old(output_dir, keep=self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def save_final(self) -> Path:
        """Write the trained model, loadable, as `OUTPUT_DIR/final`."""
        final = Path(self.args.output_dir) / FINAL
        state_dict = self.accelerator.get_state_dict(self.model_wrapped) if self.is_deepspeed_enabled else None
        if self.is_world_process_zero():
            with atomic_directory(final, kind="model", facts={"step": self.state.global_step}) as partial:
                model = self.accelerator.unwrap_model(self.model)
                write_weights(
                    partial, model, self.processor, self.record, base=self.base, home=final, state_dict=state_dict
                )
        self.accelerator.wait_for_everyone()
        return final


class JsonLog(TrainerCallback):
    """Appends what is logged to `OUTPUT_DIR/log.jsonl`, one JSON object a line."""

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        """Write one line."""
        if state.is_world_process_zero and logs:
            with Path(args.output_dir, "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps({"step": state.global_step, **logs}) + "\n")
