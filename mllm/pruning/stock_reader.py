"""Watches a stock model on its way from its encoder to its language model; what all families share."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import nn

from mllm.models.encoders import ENCODERS
from mllm.pruning.anatomy import Anatomy
from mllm.pruning.encodings import Encoding, SeenItem, square_grid
from mllm.pruning.patches import Patches, feature_patches, in_view
from mllm.shapes import EncoderFeatures


def replaced(stack: ExitStack, owner: nn.Module, name: str, method: Callable) -> None:
    """Put a method on an instance, in front of that of its class; the stack takes it off."""
    setattr(owner, name, method)
    stack.callback(delattr, owner, name)


class StockReader:
    """Watches a model on its way from encoder to language model: LLaVA, whose pictures are one view each."""

    connector: ClassVar[str] = "multi_modal_projector"
    is_pointwise: ClassVar[bool] = True

    def __init__(self, anatomy: Anatomy):
        self.model = anatomy.model
        self.backbone = anatomy.backbone
        self.unread = self.why_unread()
        self.features: EncoderFeatures | None = None

    @property
    def num_prefix_tokens(self) -> int:
        """Of the encoder's tokens, those in front of the patches."""
        vision = self.model.config.vision_config
        return ENCODERS[vision.model_type].num_prefix_tokens(vision)

    def why_unread(self) -> str | None:
        """Why the encoder tells nothing of its patches; None where it does."""
        name = self.model.config.vision_config.model_type
        known = name in ENCODERS and ENCODERS[name].features == "tokens"
        return None if known else f"its encoder is a {name}"

    def take_hold(self, stack: ExitStack) -> None:
        """Put hooks on the model, and their removal on the stack."""
        connector = self.backbone.get_submodule(self.connector)
        stack.callback(connector.register_forward_pre_hook(self._before_connector).remove)

    def start(self) -> None:
        """Forget what was seen before."""
        self.features = None

    def encoding(self, modality: str, arguments: Mapping[str, Any], lengths: list[int]) -> Encoding:
        """Of what has just been encoded.

        Args:
            modality: "image" or "video".
            arguments: Of `get_image_features` or `get_video_features`, by name.
            lengths: How many vectors each item has.
        """
        if self.unread is not None or self.features is None:
            return Encoding(0, 0, [SeenItem(slice(0), None, None) for _ in lengths], unread=self.unread)
        features = self.features
        num_leading = self.num_prefix_tokens - self._num_dropped(arguments)
        items = self.items(modality, feature_patches(features.shape[1], num_leading), lengths, len(features))
        patches = features[:, num_leading:] if self.is_pointwise else None
        connector = self.backbone.get_submodule(self.connector)
        connect = (lambda one: connector(one[None])[0]) if self.is_pointwise else None
        return Encoding(len(features), self.num_prefix_tokens, items, patches, connect)

    def items(self, modality: str, of_view: Patches, lengths: list[int], num_views: int) -> list[SeenItem]:
        """Where the items stand among the views.

        Args:
            modality: "image" or "video".
            of_view: The patches behind a view's features.
            lengths: Of the items.
            num_views: Of all items.
        """
        connected = self.connected(of_view)
        num_patches, items, first = int(of_view.max()) + 1, [], 0
        for length in lengths:
            count = length // len(connected)
            patches = torch.cat([in_view(connected, number, num_patches) for number in range(count)])
            grid = square_grid(count, length) if bool((connected >= 0).any(dim=1).all()) else None
            overview = count - 1 if count > 1 else None  # tiles come line by line, then the whole
            items.append(self.seen(first, count, patches, grid=grid, overview=overview))
            first += count
        return items

    def connected(self, of_view: Patches) -> Patches:
        """The patches behind a view's vectors, from those behind its features."""
        return of_view

    def seen(self, first: int, count: int, patches: Patches, **more: Any) -> SeenItem:
        """An item of `count` views from the `first` on.

        Args:
            first: Number of its first view.
            count: Of its views.
            patches: See `SeenItem`.
            **more: What else there is to tell of it.
        """
        fields = {"grid": None, **more}
        return SeenItem(slice(first, first + count), patches, **fields)

    def _num_dropped(self, arguments: Mapping[str, Any]) -> int:
        """Tokens in front of the patches that the connector does not read."""
        strategy = arguments.get("vision_feature_select_strategy") or self.model.config.vision_feature_select_strategy
        return 1 if strategy == "default" else 0

    def _before_connector(self, module: nn.Module, args: tuple) -> None:
        self.features = args[0]
