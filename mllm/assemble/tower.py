"""What the assembly of each modality gives."""

from typing import Any, NamedTuple

from transformers import PreTrainedModel

from mllm.models import MllmTowerConfig
from mllm.shapes import Tensor


class Tower(NamedTuple):
    """A tower before it is joined with the others.

    Args:
        encoder: Loaded; None for a video tower, whose frames the image tower's encoder reads.
        config: Of the tower; the placeholder's id is not known yet.
        component: The encoder's preprocessing; None where there is none of its own.
        connector_weights: Of a connector that was trained before; None for a fresh one.
    """

    encoder: PreTrainedModel | None
    config: MllmTowerConfig
    component: Any
    connector_weights: dict[str, Tensor] | None = None
