"""What a run shows while it goes on: a progress bar, a log of one JSON object a line, and the figures in both."""

import json
import logging
import resource
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from mllm.training.throughput import Meter, rates

LOG = "log.jsonl"
GIB = 2**30

logger = logging.getLogger(__name__)


class JsonLog(TrainerCallback):
    """Appends what is logged to `OUTPUT_DIR/log.jsonl`. A run that goes on drops the lines behind its checkpoint."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Forget the steps that will be done again."""
        log = Path(args.output_dir, LOG)
        if not state.is_world_process_zero or not log.is_file():
            return
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        log.write_text("".join(line for line in lines if _is_before(line, state.global_step)), encoding="utf-8")

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        """Write one line."""
        if state.is_world_process_zero and logs:
            append_log(args.output_dir, {"step": state.global_step, **plain_names(logs)})


class Console(TrainerCallback):
    """A progress bar with the loss, the learning rate and the pace, or with `disable_tqdm` a line in the log."""

    def __init__(self):
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Start where the run was left."""
        is_shown = state.is_world_process_zero and not args.disable_tqdm
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit="step", disable=not is_shown
        )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """One step further."""
        self.bar.update(1)

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        """Show the last figures."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        if args.disable_tqdm:
            logger.info("step %d of %d: %s", state.global_step, state.max_steps, brief(logs))
        else:
            self.bar.set_postfix_str(brief(logs), refresh=False)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Leave the full bar."""
        self.bar.close()


class Figures(TrainerCallback):
    """What a line about steps says beside the loss: the pace, the gradients of each part, the memory.

    Measuring changes nothing: it draws no random number, and reads gradients without touching them.

    Args:
        has_whole_gradients: Whether each rank holds the gradients of all parameters when a step is due. Under
            DeepSpeed and FSDP it holds pieces of them, or none: then there are no norms by part.
    """

    def __init__(self, *, has_whole_gradients: bool):
        self.has_whole_gradients = has_whole_gradients
        self.meter = Meter()
        """Counts the work of this rank."""
        self._norms: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Take the norms of the gradients, as clipping left them, before a step that is logged."""
        if self.has_whole_gradients and is_logged(args, state, step=state.global_step + 1):
            self._norms = part_norms(optimizer.param_groups)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """The clock stops; where the step is logged a GPU is waited for, as reading the loss would do right after."""
        if control.should_log and args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.meter.end_step()

    def read(self, grad_norm: float | None) -> dict[str, float]:
        """The figures since this was last read, over all ranks, which have to ask together.

        Args:
            grad_norm: Norm of all gradients before they were clipped.
        """
        norms, self._norms = before_clipping(self._norms, grad_norm), {}
        ranks = gather_object([(self.meter.take(), peak_memory())])
        peaks = [peak for _, peak in ranks]
        memory = {name: max(peak[name] for peak in peaks) for name in peaks[0]}
        return rates([work for work, _ in ranks]) | norms | memory


def append_log(output_dir: str, line: Mapping[str, Any]) -> None:
    """Write one line of the log."""
    with Path(output_dir, LOG).open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def plain_names(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The figures as log.jsonl names them: services are told "eval_loss", and show it as "eval/loss"."""
    counted = [name for name in logs if name != "total_flos"]  # not counted
    return {name.replace("eval_", "eval/", 1) if name.startswith("eval_") else name: logs[name] for name in counted}


def is_logged(args: Any, state: Any, *, step: int) -> bool:
    """Whether a line is written after this step, as transformers decides it where lines come every so many steps."""
    if step == 1 and args.logging_first_step:
        return True
    return args.logging_strategy == IntervalStrategy.STEPS and step % state.logging_steps == 0


def part_norms(groups: Iterable[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """The norm of the gradients of each part, whose name the groups of the optimiser begin with ("text/decayed")."""
    gradients: dict[str, list[torch.Tensor]] = {}
    for group in groups:
        found = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        gradients.setdefault(group["name"].split("/")[0], []).extend(found)
    return {part: torch.nn.utils.get_total_norm(found) for part, found in gradients.items() if found}


def before_clipping(norms: Mapping[str, torch.Tensor], total: float | None) -> dict[str, float]:
    """Norms by part as they were before all gradients were scaled by one factor, from the norm of all at that time.

    Example: parts of 3 and 4 after clipping, and 10 in all before it, were 6 and 8.
    """
    clipped = {part: float(norm) for part, norm in norms.items()}
    whole = sum(norm**2 for norm in clipped.values()) ** 0.5
    factor = total / whole if total is not None and whole > 0 else 1.0
    return {f"grad_norm/{part}": norm * factor for part, norm in clipped.items()}


def peak_memory() -> dict[str, float]:
    """The most that this process has held so far, in GiB: of the machine's memory, and of the GPU's."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / GIB
    return found


def brief(logs: Mapping[str, float]) -> str:
    """The figures that fit behind a progress bar.

    Example: "loss=1.234, lr=0.0002, 5,300 tok/s".
    """
    parts = [f"loss={logs['loss']:.4g}"]
    if "learning_rate" in logs:
        parts.append(f"lr={logs['learning_rate']:.3g}")
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tok/s")
    return ", ".join(parts)


def _is_before(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step and step > 0
    except (ValueError, KeyError):
        return False  # half a line of a killed run
