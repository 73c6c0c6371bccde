"""What a run would do, found out without a step of it: `train/sft.py --dry_run`."""

from mllm.training.preflight.look import PREFLIGHT, preflight
from mllm.training.preflight.report import Preflight, write_report
from mllm.training.preflight.text import report_text

__all__ = ["PREFLIGHT", "Preflight", "preflight", "report_text", "write_report"]
