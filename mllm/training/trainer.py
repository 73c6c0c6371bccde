"""What every training of ours shares: batches, parts, the loss's divisor, checkpoints."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mllm.checkpoints import atomic_directory, mark_complete, read_complete
from mllm.data.collate import LeavingOut, PaddingCollator
from mllm.data.examples import Examples
from mllm.data.left_out import usable_batches
from mllm.data.sampler import EpochDataLoader, RankBatches
from mllm.models.parts import PartOptions, freeze_unused, learning_rate_groups
from mllm.processing import MllmProcessor
from mllm.training.arguments import SftArguments
from mllm.training.callbacks import Console, JsonLog
from mllm.training.checkpoint import FINAL, PREFIX, remove_old, write_weights
from mllm.training.run_record import RUN_RECORD


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
            data_collator=LeavingOut(PaddingCollator(processor)),
            callbacks=[JsonLog(), Console()],
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        # The count of supervised tokens of the whole global batch is what the loss is divided by. Trainer looks for
        # it in the signature of the model's forward, which PEFT hides.
        self.model_accepts_loss_kwargs = True
        # Not transformers' `processing_class`: it would set the model's end tokens back to the tokenizer's.
        self.processor = processor
        self.parts = dict(parts)
        self.base = base
        self.record = record
        self.left_out: Counter[str] = Counter()
        """Rows left out of batches before the checkpoint that the run goes on from, by reason."""
        self.aside: Path | None = None
        self.tower_parameters: list[torch.nn.Parameter] = []

    def train_from(self, checkpoint: Path | None) -> None:
        """Train from the beginning, or go on from a checkpoint; one of the last step is only loaded."""
        if checkpoint is not None:
            before = json.loads((checkpoint / RUN_RECORD).read_text(encoding="utf-8"))
            self.left_out = Counter(before["rows"].get("left_out"))
        if checkpoint is not None and (read_complete(checkpoint) or {})["is_last"]:
            self._load_from_checkpoint(str(checkpoint))
        else:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args, **kwargs) -> tuple[list, Any]:
        """The micro-batches of a step and their number of supervised tokens; what was left out of them is accounted.

        A step of which every row was left out has nothing to learn, and nothing to divide by either.
        """
        batches = usable_batches(epoch_iterator, self.train_dataset.account.add)
        samples, num_items = super().get_batch_samples(batches, *args, **kwargs)
        return samples, max(num_items, 1) if isinstance(num_items, int) else num_items.clamp(min=1)

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro-batches. They are planned for all ranks together, so accelerate has nothing to shard."""
        batches = RankBatches(
            self.train_dataset.order,
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
            generator=torch.Generator(),  # its own: the global one shall stand where it stood, with workers or without
        )

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """One group for each part and decay, each with its own learning rate."""
        self.optimizer: torch.optim.Optimizer | None
        if self.optimizer is None:
            freeze_unused(self.model)
            groups = learning_rate_groups(
                self.model,
                self.parts,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
            )
            self.tower_parameters = [
                parameter for group in groups if not group["name"].startswith("text/") for parameter in group["params"]
            ]
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args, **kwargs) -> Any:
        """The model's loss; without media it is joined to the towers all the same, with a gradient of zero.

        Several ranks do that in the forward (their collectives have to meet). One process has to come to the same end:
        a step without media is a step of zero for a tower, and not none at all; and where only a tower is trained,
        there is something to go backward through.
        """
        loss = super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)
        if self.args.world_size == 1 and "pixel_values" not in inputs:
            loss = loss + sum(0.0 * parameter.sum() for parameter in self.tower_parameters)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: transformers' estimate knows nothing of towers, and walks the whole model at every step."""
        return 0

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write weights and processor, and no pickled arguments. transformers calls this wherever it saves a model."""
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        home = Path(self.args.output_dir) / directory.name
        write_weights(directory, model, self.processor, self.record, base=self.base, home=home, state_dict=state_dict)

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints are written: beside their place while they are incomplete."""
        return str(self.aside or self.args.output_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write the checkpoint aside, and give it its name when it is complete."""
        self._record_left_out()
        name = f"{PREFIX}{self.state.global_step}"
        output_dir = Path(self.args.output_dir)
        self.aside = output_dir / f"{name}.partial"
        if self.is_world_process_zero():
            shutil.rmtree(self.aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            facts = {"step": self.state.global_step, "is_last": self.state.global_step >= self.state.max_steps}
            mark_complete(self.aside / name, kind="checkpoint", facts=facts)
            shutil.rmtree(output_dir / name, ignore_errors=True)
            os.rename(self.aside / name, output_dir / name)
            remove_old(output_dir, keep=self.args.save_total_limit)
        self.aside = None
        self.accelerator.wait_for_everyone()

    def _record_left_out(self) -> None:
        """What all ranks have left out of their batches so far, for the record that is saved with the weights."""
        counts = sum(gather_object([self.train_dataset.account.counts]), self.left_out)
        if counts:
            self.record["rows"]["left_out"] = dict(counts)

    def save_final(self) -> Path:
        """Write the trained model, loadable, as `OUTPUT_DIR/final`."""
        self._record_left_out()
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
