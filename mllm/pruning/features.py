"""The stage in front of the language model: what connectors gave, item by item, with what leaves marked."""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import nn

from mllm.models.media import Media
from mllm.pruning.anatomy import Anatomy
from mllm.pruning.base import Item, Pruner, Selection
from mllm.pruning.encoder_hooks import EncoderHooks
from mllm.pruning.encodings import composed_encoding, stock_encoding
from mllm.shapes import EncoderFeatures, Float, MediaVectors, Tensor


class FeatureStage:
    """Asks a pruner about each item as it comes from its connector."""

    def __init__(self, anatomy: Anatomy, pruner: Pruner):
        self.anatomy = anatomy
        self.pruner = pruner
        self.encoder = EncoderHooks(anatomy, pruner.encoder_layers)
        self.lengths: dict[str, list[int]] = {}
        self.connector_input: Tensor | None = None

    def take_hold(self, stack: ExitStack) -> None:
        """Put methods of the same names on the instance, in front of those of its class; the stack removes them."""
        self.encoder.take_hold(stack)
        backbone = self.anatomy.backbone
        if self.anatomy.is_composed:
            self._replace(stack, backbone, "connect_media", self._connect_media)
            return
        projector = backbone.multi_modal_projector
        stack.callback(projector.register_forward_pre_hook(self._before_connector).remove)
        for modality in self.anatomy.placeholders:
            name = f"get_{modality}_features"
            self._replace(stack, backbone, name, self._get_features(modality, getattr(backbone, name)))

    def lengths_of(self, encoded: Mapping[str, Any] | None) -> dict[str, list[int]]:
        """How many tokens each item of a forward has, by modality, in order of appearance.

        Args:
            encoded: Media that were encoded before this forward, and perhaps repeated since.
        """
        given = {
            modality: [len(item) for item in outputs.pooler_output]
            for modality, outputs in (encoded or {}).items()
            if modality in self.anatomy.placeholders
        }
        lengths, self.lengths = self.lengths, {}
        return given or lengths

    @staticmethod
    def _replace(stack: ExitStack, owner: nn.Module, name: str, method: Any) -> None:
        setattr(owner, name, method)
        stack.callback(delattr, owner, name)

    def _connect_media(self, media: Media, features: EncoderFeatures) -> Any:
        connected = type(self.anatomy.backbone).connect_media(self.anatomy.backbone, media, features)
        if media.modality not in self.anatomy.placeholders:
            return connected
        vectors = list(connected)
        encoding = composed_encoding(self.anatomy, media, features, vectors)
        vectors = self._pruned(media.modality, self.encoder.items(media.modality, vectors, encoding))
        return torch.stack(vectors) if isinstance(connected, Tensor) else vectors

    def _before_connector(self, module: nn.Module, args: tuple) -> None:
        self.connector_input = args[0]

    def _get_features(self, modality: str, own: Any) -> Any:
        @wraps(own)  # `generate` reads its signature
        def get_features(*args: Any, **kwargs: Any) -> Any:
            outputs = own(*args, **kwargs)
            connected = outputs.pooler_output
            vectors = list(connected)
            encoding = stock_encoding(self.anatomy, vectors, self.connector_input, kwargs)
            vectors = self._pruned(modality, self.encoder.items(modality, vectors, encoding))
            outputs.pooler_output = torch.stack(vectors) if isinstance(connected, Tensor) else tuple(vectors)
            return outputs

        return get_features

    def _pruned(self, modality: str, items: list[Item]) -> list[MediaVectors]:
        self.lengths[modality] = [len(item.vectors) for item in items]
        num_layers = len(self.anatomy.layers)
        return [marked(item.vectors, self.pruner.select(item, num_layers), self.pruner.positions) for item in items]


def marked(vectors: MediaVectors, selection: Selection | None, positions: str) -> MediaVectors:
    """Vectors with those that leave marked: their numbers are no numbers.

    Where positions are compacted, those that stay come in the order that the selection has them in.
    """
    if selection is None:
        return vectors
    places = selection.kept
    if positions == "compacted":
        places = places.sort().values
    values: Float[Tensor, "n D"] = vectors[selection.kept] if selection.values is None else selection.values
    nothing = torch.full_like(vectors, float("nan"))
    return nothing.index_put((places,), values.to(vectors.dtype))
