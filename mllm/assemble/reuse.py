"""A connector that another model was trained with, for an encoder whose features mean the same.

Video-LLaMA (arXiv 2306.02858) trains its audio branch on pictures alone: ImageBind maps both into one space, so what
connects its picture features connects its sounds, too.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mllm.errors import CompositionError, OptionError
from mllm.load import load_model, merged
from mllm.models import MllmForConditionalGeneration
from mllm.shapes import Tensor

KEYS = ("model", "modality")


class TrainedConnector(NamedTuple):
    """A connector out of a trained model.

    Args:
        written: Its type and options, as a configuration holds them.
        feature_sizes: Width of the features that it reads.
        out_size: Width of the language model that it leads to.
        weights: Its parameters by name.
        where: Names it in errors.
    """

    written: dict[str, Any]
    feature_sizes: tuple[int, ...]
    out_size: int
    weights: dict[str, Tensor]
    where: str


def read_connector(source: Mapping[str, Any]) -> TrainedConnector:
    """A connector out of a model that was assembled here, and perhaps trained; also out of an adapter.

    Args:
        source: `model`, a checkpoint's directory or Hub id, and `modality`, whose connector it is.

    Raises:
        OptionError: Other keys.
        CompositionError: The model has no such connector.
    """
    if not isinstance(source, Mapping) or sorted(source) != sorted(KEYS):
        raise OptionError(
            f"connector_from = {source!r:.120}",
            expected=f"a mapping with {' and '.join(KEYS)}",
            do="write, e.g., `connector_from: {model: runs/vision, modality: video}`",
        )
    path, modality = str(source["model"]), source["modality"]
    model = merged(load_model(path))
    towers = model.model.towers if isinstance(model, MllmForConditionalGeneration) else {}
    if modality not in towers:
        raise CompositionError(
            f"connector_from: {path} has no {modality} connector",
            expected=f"one of {', '.join(towers)}" if towers else "a model that `assemble` made",
            do="correct `model` or `modality`",
        )
    tower = towers[modality]
    return TrainedConnector(
        written=dict(tower.config.connector),
        feature_sizes=tuple(tower.config.feature_sizes),
        out_size=tower.config.text_hidden_size,
        weights=tower.connector.state_dict(),
        where=f"the {modality} connector of {path}",
    )


def check_fits(trained: TrainedConnector, *, feature_sizes: tuple[int, ...], out_size: int) -> None:
    """Check that a connector reads an encoder's features, and leads to the language model.

    That they mean the same nobody can check: it is for encoders that were trained into one space.

    Raises:
        CompositionError: The widths differ.
    """
    if (trained.feature_sizes, trained.out_size) != (feature_sizes, out_size):
        raise CompositionError(
            f"{trained.where}, which leads from {trained.feature_sizes} to {trained.out_size}",
            expected=f"from {feature_sizes} to {out_size}: the same widths of encoder and language model",
            do="choose an encoder of the same space, and the same language model, or train a connector of its own",
        )
