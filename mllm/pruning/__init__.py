"""Drop or merge visual tokens while a model generates; a pruner is a context in which that is so."""

from mllm.pruning.base import Cut, Item, Pruner, Row, Selection
from mllm.pruning.evidence import Evidence
from mllm.pruning.random_choice import Random
from mllm.pruning.statistics import Statistics
from mllm.pruning.uniform import Uniform

PRUNERS: dict[str, type[Pruner]] = {
    "random": Random,
    "uniform": Uniform,
}
"""By the name that programs know them under."""

__all__ = ["PRUNERS", "Cut", "Evidence", "Item", "Pruner", "Random", "Row", "Selection", "Statistics", "Uniform"]
