"""What a run shows while it goes on: a progress bar, and a log of one JSON object a line."""

import json
import logging
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

LOG = "log.jsonl"

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
            numbers = {name: value for name, value in logs.items() if name != "total_flos"}  # not counted
            with Path(args.output_dir, LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps({"step": state.global_step, **numbers}) + "\n")


class Console(TrainerCallback):
    """A progress bar with the loss, or with `disable_tqdm` a line in the program's log."""

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
        """Show the loss."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        if args.disable_tqdm:
            logger.info("step %d of %d: loss %.4g", state.global_step, state.max_steps, logs["loss"])
        else:
            self.bar.set_postfix(loss=f"{logs['loss']:.4g}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Leave the full bar."""
        self.bar.close()


def _is_before(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step and step > 0
    except (ValueError, KeyError):
        return False  # half a line of a killed run
