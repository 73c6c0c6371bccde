"""Images to vectors whose cosine says how much alike two of them look: the model's own encoder, or one like CLIP."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm.errors import OptionError
from mllm.models.configuration import MllmConfig
from mllm.models.media import VALUES, media_layout
from mllm.processing import TrainingProcessor
from mllm.processing.media import MediaInput
from mllm.shapes import Float, Tensor


@runtime_checkable
class ImageEmbedder(Protocol):
    """Makes one vector of each image."""

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "N D"]:
        """A vector for each image, of any length."""


class ModelEmbedder:
    """What a multimodal model's own image encoder makes of an image: the mean of the features of all its patches.

    Args:
        model: Composed, or one of transformers' own; no adapter. It stays where it is.
        processor: The processor saved with the model.

    Raises:
        OptionError: The model reads no images.
    """

    def __init__(self, model: PreTrainedModel, processor: TrainingProcessor):
        if "image" not in processor.media_kinds:
            raise OptionError(
                "a model that reads no images",
                expected="one whose image encoder can compare them",
                do="name an encoder that is like CLIP",
            )
        self.model = model
        self.processor = processor

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "N D"]:
        """A vector for each image. What has views of many sizes is encoded image by image."""
        items = [MediaInput("image", image, (image.height, image.width), row) for row, image in enumerate(images)]
        if isinstance(self.model.config, MllmConfig):
            return self._composed(items)
        return torch.stack([self._stock(MediaInput(item.kind, item.data, item.size)) for item in items])

    @torch.no_grad()
    def _composed(self, items: list[MediaInput]) -> Float[Tensor, "N D"]:
        inputs = _on(self.processor.encode_media(items), self.model.device)
        tower = self.model.model.towers["image"]
        values, sizes = inputs[VALUES["image"]], inputs.get("image_sizes")
        views = tower.encode(values).float().mean(1)
        if sizes is None:
            return views
        counts = [len(of_item) for of_item in media_layout(tower.rule, sizes, num_views=len(values)).views]
        return torch.stack([of_item.mean(0) for of_item in views.split(counts)])

    @torch.no_grad()
    def _stock(self, item: MediaInput) -> Float[Tensor, " D"]:
        inputs = _on(self.processor.encode_media([item]), self.model.device)
        hidden = self.model.get_image_features(**inputs).last_hidden_state
        return hidden.float().flatten(0, -2).mean(0)


class ClipEmbedder:
    """What an encoder makes of an image by itself, such as the one of CLIP that Re-Align took.

    Args:
        model: Of a type in `EMBEDDERS`. It stays where it is.
        image_processor: The one saved with it.
    """

    def __init__(self, model: PreTrainedModel, image_processor: Any):
        self.model = model
        self.image_processor = image_processor

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | str = "auto"
    ) -> "ClipEmbedder":
        """Load an encoder: a directory, or an id of the Hub.

        Raises:
            OptionError: It is of another type, or has no preprocessing with it.
        """
        try:
            model_type = AutoConfig.from_pretrained(str(path)).model_type
            image_processor = AutoImageProcessor.from_pretrained(str(path))
        except (OSError, ValueError) as error:
            raise _no_embedder(path, str(error).splitlines()[0]) from error
        if model_type not in EMBEDDERS:
            raise _no_embedder(path, f"a model of type {model_type!r}")
        model = AutoModel.from_pretrained(str(path), dtype=dtype, use_safetensors=True)
        return cls(model.eval().to(device), image_processor)

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "N D"]:
        """A vector for each image."""
        inputs = _on(self.image_processor(list(images), return_tensors="pt"), self.model.device)
        pixels = inputs["pixel_values"].to(self.model.dtype)
        return EMBEDDERS[self.model.config.model_type](self.model, pixels).pooler_output.float()


def _projected(model: Any, pixels: Tensor) -> BaseModelOutputWithPooling:
    """Where images and texts are compared."""
    return model.get_image_features(pixel_values=pixels)


def _pooled(model: Any, pixels: Tensor) -> BaseModelOutputWithPooling:
    return model(pixel_values=pixels)


EMBEDDERS: dict[str, Callable[[Any, Tensor], BaseModelOutputWithPooling]] = {
    "clip": _projected,
    "siglip": _projected,
    "clip_vision_model": _pooled,
    "siglip_vision_model": _pooled,
    "dinov2": _pooled,
    "dinov2_with_registers": _pooled,
    "dinov3_vit": _pooled,
}
"""How an encoder is asked for one vector an image, by its model type."""


def _on(inputs: Any, device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) for name, value in inputs.items()}


def _no_embedder(path: str | Path, found: str) -> OptionError:
    return OptionError(
        f"{path}: {found}",
        expected=f"an image encoder with its preprocessing, of one of these types: {', '.join(EMBEDDERS)}",
        do="name another, or none for the model's own",
    )
