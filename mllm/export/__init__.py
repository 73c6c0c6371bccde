"""Export: from our model to directories that stock transformers loads, verified, with a card, on the Hub."""

from mllm.export.hub import push
from mllm.export.native import export
from mllm.export.probes import Probe
from mllm.export.report import ExportReport, read_report

__all__ = ["ExportReport", "Probe", "export", "push", "read_report"]
