"""Drop or merge visual tokens while a model generates; a pruner is a context in which that is so."""

from mllm.pruning.base import Cut, Item, Pruner, Row, Selection
from mllm.pruning.crossget import CrossGet
from mllm.pruning.divprune import DivPrune
from mllm.pruning.evidence import Evidence
from mllm.pruning.fastv import FastV
from mllm.pruning.hired import HiRED
from mllm.pruning.pyramiddrop import PyramidDrop
from mllm.pruning.random_choice import Random
from mllm.pruning.sparsevlm import SparseVLM
from mllm.pruning.spec import read_spec
from mllm.pruning.statistics import Statistics
from mllm.pruning.tome import ToMe
from mllm.pruning.uniform import Uniform
from mllm.pruning.visiondrop import VisionDrop
from mllm.pruning.visionzip import VisionZip

PRUNERS: dict[str, type[Pruner]] = {
    "crossget": CrossGet,
    "divprune": DivPrune,
    "fastv": FastV,
    "hired": HiRED,
    "pyramiddrop": PyramidDrop,
    "random": Random,
    "sparsevlm": SparseVLM,
    "tome": ToMe,
    "uniform": Uniform,
    "visiondrop": VisionDrop,
    "visionzip": VisionZip,
}
"""By the name that programs know them under."""

__all__ = [
    "PRUNERS",
    "CrossGet",
    "Cut",
    "DivPrune",
    "Evidence",
    "FastV",
    "HiRED",
    "Item",
    "Pruner",
    "PyramidDrop",
    "Random",
    "Row",
    "Selection",
    "SparseVLM",
    "Statistics",
    "ToMe",
    "Uniform",
    "VisionDrop",
    "VisionZip",
    "build_pruner",
]


def build_pruner(spec: str) -> Pruner:
    """The pruner that a program was told of: `visiondrop tokens=64 positions=compacted`.

    Raises:
        OptionError: See `mllm.pruning.spec.read_spec`.
    """
    return read_spec(spec, PRUNERS)
