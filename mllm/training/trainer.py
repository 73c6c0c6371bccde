"""What every training of ours shares: batches, parts, the loss's divisor, checkpoints."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import Trainer, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerControl

from mllm.checkpoints import atomic_directory, mark_complete, read_complete
from mllm.data.collate import Collator, Features, LeavingOut, PackingCollator, PaddingCollator
from mllm.data.examples import Examples
from mllm.data.left_out import usable_batches
from mllm.data.sampler import EpochDataLoader, RankBatches
from mllm.models.media import VALUES
from mllm.models.parts import PartOptions, freeze_unused, learning_rate_groups
from mllm.models.supervised import attach_supervised_forward
from mllm.processing import StockProcessor, TrainingProcessor
from mllm.processing.blank import blank_media
from mllm.training.arguments import SftArguments
from mllm.training.batching import make_collator, plan_batches
from mllm.training.callbacks import Console, Figures, JsonLog
from mllm.training.checkpoint import FINAL, PREFIX, copy_model, remove_old, require_weights, write_weights
from mllm.training.finite import FiniteLoss
from mllm.training.run_record import RUN_RECORD
from mllm.training.samples import SampleAnswers
from mllm.training.sharding import whole_copies
from mllm.training.source_losses import SourceLosses, num_supervised, source_names, with_token_sources
from mllm.training.validation import Validation

MEDIA_INPUTS = {kind: (values, f"{kind}_features") for kind, values in VALUES.items()}
"""Under which names a batch has the media of each kind."""


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
        features: Of all media, in place of decoding them; see `mllm.training.feature_cache`.
        validation: What to validate on.
    """

    unit = "supervised_tokens"
    """What the loss is a mean over, as the log names it."""

    def __init__(
        self,
        model: torch.nn.Module,
        args: SftArguments,
        *,
        examples: Examples,
        processor: TrainingProcessor,
        parts: Mapping[str, PartOptions],
        base: Path,
        record: dict[str, Any],
        features: Features | None = None,
        validation: Examples | None = None,
    ):
        has_ranks_to_join = args.world_size > 1 and isinstance(processor, StockProcessor)
        self.blank = blank_media(processor) if has_ranks_to_join else None
        attach_supervised_forward(model, blank=self.blank)
        super().__init__(
            model=model,
            args=args,
            train_dataset=examples,
            eval_dataset=validation,
            data_collator=LeavingOut(
                self.collator(
                    args,
                    make_collator(args, processor, source_of=examples.rows.source_number, features=features),
                    model,
                    is_training=True,
                )
            ),
            callbacks=[JsonLog(), Console()],
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.figures = Figures(has_whole_gradients=not (self.is_deepspeed_enabled or self.is_fsdp_enabled))
        self.add_callback(self.figures)
        # The loss is divided by the count of supervised tokens of the whole global batch, so Trainer must not divide
        # it again. It would ask the model's class; some sixty of them say that they do not take the count.
        self.model_accepts_loss_kwargs = True
        self.finite_loss = FiniteLoss(examples.rows)
        self.source_losses = SourceLosses(
            source_names(index.source for index in examples.rows.indexes), unit=self.unit
        )
        # Not transformers' `processing_class`: it would set the model's end tokens back to the tokenizer's.
        self.processor = processor
        self.parts = dict(parts)
        self.base = base
        self.record = record
        self.left_out: Counter[str] = Counter()
        """Rows left out of batches before the checkpoint that the run goes on from, by reason."""
        self.aside: Path | None = None
        self.finished: Path | None = None
        """The checkpoint of the last step, where the run was stopped behind it."""
        self.tower_parameters: dict[str, list[torch.nn.Parameter]] = {kind: [] for kind in MEDIA_INPUTS}
        if validation is not None:
            self._add_validation(validation)

    def collator(
        self,
        args: SftArguments,
        texts: PaddingCollator | PackingCollator,
        model: torch.nn.Module,
        *,
        is_training: bool,
    ) -> Collator:
        """What makes batches of examples, of training or validation, out of what makes them of conversations."""
        return texts

    def prepare_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A micro-batch, while it is on the CPU, with what the loss will ask about it."""
        return with_token_sources(batch)

    def num_items(self, batch: dict[str, Any]) -> int:
        """By how many the loss of a micro-batch counts."""
        return num_supervised(batch["labels"])

    def loss_of(self, model: torch.nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | None) -> Any:
        """The loss of a micro-batch, divided by the items of the whole step, and what the model returned."""
        raise NotImplementedError

    def losses_of(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a micro-batch of validation the source and the loss of each item."""
        raise NotImplementedError

    def _add_validation(self, examples: Examples) -> None:
        texts = PaddingCollator(self.processor, source_of=examples.rows.source_number)
        self.validation = Validation(
            examples,
            LeavingOut(self.collator(self.args, texts, self.model, is_training=False)),
            unit=self.unit,
            batch_size=self.args.per_device_eval_batch_size,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            num_workers=self.args.dataloader_num_workers,
        )
        if self.args.eval_sample_steps:
            is_sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
            every = self.args.eval_sample_steps
            self.add_callback(
                SampleAnswers(examples, PaddingCollator(self.processor), every=every, all_ranks=is_sharded)
            )

    def train_from(self, checkpoint: Path | None) -> None:
        """Train from the beginning, or go on from a checkpoint; behind the last step nothing is left to do."""
        if checkpoint is not None:
            before = json.loads((checkpoint / RUN_RECORD).read_text(encoding="utf-8"))
            self.left_out = Counter(before["rows"].get("left_out"))
            if (read_complete(checkpoint) or {})["is_last"]:
                self.finished = checkpoint
                return
        # Each rank has dropout of its own; a checkpoint holds the state of every rank's random numbers.
        set_seed(self.args.seed + self.args.process_index)
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        """The micro-batches of a step on this rank, and the number of items of the step on all ranks.

        What was left out of them is accounted. A step of which every row was left out has nothing to learn, and
        nothing to divide by either.
        """
        watched = self.finite_loss.watch(self.figures.meter.watch(epoch_iterator))
        batches = map(self.prepare_batch, usable_batches(watched, self.train_dataset.account.add))
        samples = list(islice(batches, num_batches))
        num_items = torch.tensor(sum(map(self.num_items, samples)), device=device)
        return samples, self.accelerator.reduce(num_items, reduction="sum").clamp(min=1)

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro-batches. They are planned for all ranks together, so accelerate has nothing to shard."""
        batches = RankBatches(plan_batches(self.args, self.train_dataset, self.model), rank=self.args.process_index)
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
            self.tower_parameters = {
                kind: [one for group in groups if group["name"].startswith(f"{kind}.") for one in group["params"]]
                for kind in MEDIA_INPUTS
            }
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The loss; without media of a kind it is joined to their tower all the same, with a gradient of zero.

        Several ranks do that in the forward (their collectives have to meet). One process has to come to the same end:
        a step without media is a step of zero for a tower, and not none at all; and where only a tower is trained,
        there is something to go backward through.

        Raises:
            TrainingError: The loss of the step is no number; raised on all ranks, before the gradients of the step are
                complete.
        """
        found, outputs = self.loss_of(model, inputs, num_items_in_batch)
        self.finite_loss.add(found)
        if self.accelerator.sync_gradients:
            self.finite_loss.check(self.accelerator, **self._step_in_work())
        # The gradients of all ranks are averaged, and each loss is already divided by the items of all.
        loss = found * self.accelerator.num_processes
        if self.args.world_size == 1:
            for kind, names in MEDIA_INPUTS.items():
                if not any(len(inputs.get(name, ())) for name in names):
                    loss = loss + sum(0.0 * parameter.sum() for parameter in self.tower_parameters[kind])
        return (loss, outputs) if return_outputs else loss

    def _step_in_work(self) -> dict[str, Any]:
        rate = self.optimizer.param_groups[0]["lr"]
        step = self.state.global_step + 1
        return {"step": step, "learning_rate": rate, "output_dir": Path(self.args.output_dir)}

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the gradients, seen before the step is taken (by DeepSpeed: before it is saved).

        Raises:
            TrainingError: It is no number.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.scaler is None:  # that of fp16 looks for such gradients, and leaves the step out, itself
            self.finite_loss.check_gradients(None if norm is None else float(norm), **self._step_in_work())
        return norm

    def evaluate(self, *args, **kwargs) -> dict[str, int | float]:
        """Log the loss on the validation rows, in all and by source. transformers calls this when it is time."""
        metrics = {f"eval_{name}": value for name, value in self.validate().items()}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def validate(self) -> dict[str, int | float]:
        """The figures of the validation rows; all ranks come here together."""
        model = self.model_wrapped
        return self.validation.losses(
            model, lambda batch: self.losses_of(model, self._prepare_inputs(self.prepare_batch(batch)))
        )

    def log(self, logs: dict[str, int | float], start_time: float | None = None) -> None:
        """Add the figures to a line about steps; all ranks come here together."""
        if "grad_norm" in logs:
            sources = self.source_losses.read()
            logs |= {name: value for name, value in sources.items() if name != "loss"}
            logs |= self.figures.read(logs["grad_norm"])
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: transformers' estimate knows nothing of towers, and walks the whole model at every step."""
        return 0

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write weights and processor; transformers gathers what is sharded."""
        with whole_copies(self.model):
            super().save_model(output_dir, _internal_call)

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
            require_weights(self.aside / name)
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
        final = Path(self.args.output_dir) / FINAL
        if self.finished is not None:
            if self.is_world_process_zero():
                copy_model(self.finished, final)
            self.accelerator.wait_for_everyone()
            return final
        self._record_left_out()
        is_sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        state_dict = self.accelerator.get_state_dict(self.model_wrapped) if is_sharded else None
        if self.is_world_process_zero():
            with atomic_directory(final, kind="model", facts={"step": self.state.global_step}) as partial:
                model = self.accelerator.unwrap_model(self.model)
                write_weights(
                    partial, model, self.processor, self.record, base=self.base, home=final, state_dict=state_dict
                )
        self.accelerator.wait_for_everyone()
        return final
