"""Stock models whose texts show the same image more than once: it is encoded once, and put at each of its places."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mllm.models.media import at_places
from mllm.models.ranks import is_called_together
from mllm.shapes import Int, Tensor

Connected = Mapping[str, Any]
"""What `get_image_features` of a model's class gives the language model, by the names it has there, each image once.

`pooler_output` is a tensor [N, V, D], or a tensor for each image; `deepstack_features` of Qwen3-VL has such for
several of its layers.
"""

GRIDS = "image_grid_thw"
"""The input of Qwen-VL that has the size of each image, from which also the positions of its tokens follow."""


class Images:
    """The images of a forward.

    Args:
        backbone: A stock model without its head.
        places: Which image stands at each place of the texts; None where each stands at one, in order.
        grids: `GRIDS`, of models that have it.
        connected: What the images became in a forward before, in place of them.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        *,
        places: Int[Tensor, " places"] | None,
        grids: Int[Tensor, "N 3"] | None,
        connected: Connected | None,
    ):
        self.backbone = backbone
        self.places = places
        self.grids = grids
        self.connected = connected

    @property
    def inputs(self) -> dict[str, Any]:
        """Of the backbone, in place of those of the same names."""
        found: dict[str, Any] = {}
        if self.places is not None and self.grids is not None:
            found[GRIDS] = self.grids[self.places]
        if self.connected is not None:
            found["mm_encoder_outputs"] = {"image": SimpleNamespace(**self._placed(self.connected))}
        return found

    def seen(self, outputs: Any) -> Any:
        """What `get_image_features` gave, with each image as often as it has places."""
        fields = vars(outputs)  # its mapping lacks what was set behind its construction
        names = ("pooler_output", "deepstack_features")
        self.connected = {name: fields[name] for name in names if fields.get(name) is not None}
        for name, values in self._placed(self.connected).items():
            setattr(outputs, name, values)
        return outputs

    def to_share(self) -> dict[str, Any] | None:
        """Inputs of a second forward that may do without the encoder: where it, and the connector, are frozen."""
        if self.connected is None or any(one.requires_grad for one in self.connected["pooler_output"]):
            return None
        decoder = self.backbone.get_decoder()
        others = [module for module in self.backbone.children() if module is not decoder]
        if any(_is_trained(module) or is_called_together(module, training=False) for module in others):
            return None
        return {"connected_images": self.connected}

    def _placed(self, connected: Connected) -> dict[str, Any]:
        if self.places is None:
            return dict(connected)
        found = {"pooler_output": at_places(connected["pooler_output"], self.places)}
        if "deepstack_features" in connected:
            found["deepstack_features"] = [at_places(one, self.places) for one in connected["deepstack_features"]]
        return found


@contextmanager
def images_at(
    backbone: PreTrainedModel,
    *,
    places: Int[Tensor, " places"] | None,
    grids: Int[Tensor, "N 3"] | None,
    connected: Connected | None,
) -> Iterator[Images]:
    """Inside, a backbone that encodes images puts each at all of its places. Arguments as of `Images`."""
    images = Images(backbone, places=places, grids=grids, connected=connected)
    if places is None:
        yield images
        return
    own = backbone.get_image_features
    before = vars(backbone).get("get_image_features")  # a pruner's

    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        # The grids that come here are those of the places.
        return images.seen(own(*(args if grids is None else (args[0], grids, *args[2:])), **kwargs))

    backbone.get_image_features = get_image_features
    try:
        yield images
    finally:
        if before is None:
            del backbone.get_image_features
        else:
            backbone.get_image_features = before


def _is_trained(module: nn.Module) -> bool:
    """Also while its adapters are off, or no graph is made: what it becomes may change with the next step."""
    return any(parameter.requires_grad for parameter in module.parameters())
