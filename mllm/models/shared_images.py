"""Stock models whose texts show the same image more than once: it is encoded once, and put at each of its places."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm.models.ranks import is_called_together
from mllm.shapes import Int, Tensor


class Images:
    """The images of a forward.

    Args:
        backbone: A stock model without its head.
        places: Which image stands at each place of the texts; None where each stands at one, in order.
        connected: What the images became in a forward before, in place of them.
    """

    def __init__(
        self, backbone: PreTrainedModel, places: Int[Tensor, " places"] | None, connected: Sequence[Tensor] | None
    ):
        self.backbone = backbone
        self.places = places
        self.connected = None if connected is None else tuple(connected)

    @property
    def inputs(self) -> dict[str, Any]:
        """Of the backbone, where the images are encoded already."""
        if not self.connected:
            return {}
        return {
            "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=self._placed(self.connected))}
        }

    def seen(self, outputs: Any) -> Any:
        """What `get_image_features` gave, with each image as often as it has places."""
        self.connected = tuple(outputs.pooler_output)
        outputs.pooler_output = self._placed(self.connected)
        return outputs

    def to_share(self) -> dict[str, Any] | None:
        """Inputs of a second forward that may do without the encoder: where it, and the connector, are frozen."""
        if not self.connected or any(one.requires_grad for one in self.connected):
            return None
        decoder = self.backbone.get_decoder()
        others = [module for module in self.backbone.children() if module is not decoder]
        if any(_is_trained(module) or is_called_together(module, training=False) for module in others):
            return None
        return {"connected_images": self.connected}

    def _placed(self, connected: Sequence[Tensor]) -> list[Tensor]:
        return list(connected) if self.places is None else [connected[image] for image in self.places.tolist()]


@contextmanager
def images_at(
    backbone: PreTrainedModel, places: Int[Tensor, " places"] | None, connected: Sequence[Tensor] | None
) -> Iterator[Images]:
    """Inside, a backbone that encodes images puts each at all of its places. Arguments as of `Images`."""
    images = Images(backbone, places, connected)
    if places is None:
        yield images
        return
    own = backbone.get_image_features

    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        return images.seen(own(*args, **kwargs))

    backbone.get_image_features = get_image_features
    try:
        yield images
    finally:
        del backbone.get_image_features


def _is_trained(module: nn.Module) -> bool:
    """Also while its adapters are off, or no graph is made: what it becomes may change with the next step."""
    return any(parameter.requires_grad for parameter in module.parameters())
