"""The stage in front of the language model: what connectors gave, item by item, with what leaves marked."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import wraps
from inspect import signature
from typing import Any

import torch

from mllm.errors import OptionError
from mllm.models.media import Media
from mllm.pruning.anatomy import Anatomy
from mllm.pruning.base import Item, Pruner, Selection
from mllm.pruning.composed_encodings import composed_encoding, unread_encoder
from mllm.pruning.encoder_hooks import EncoderHooks
from mllm.pruning.pictures import picture_lengths
from mllm.pruning.stock_reader import StockReader, replaced
from mllm.pruning.stock_readers import STOCK_READERS
from mllm.shapes import EncoderFeatures, Float, Int, MediaVectors, Tensor


class FeatureStage:
    """Asks a pruner about each item as it comes from its connector."""

    def __init__(self, anatomy: Anatomy, pruner: Pruner):
        self.anatomy = anatomy
        self.pruner = pruner
        self.reader: StockReader | None = None
        if not anatomy.is_composed:
            self.reader = STOCK_READERS[anatomy.model.config.model_type](anatomy)
        unread = unread_encoder(anatomy.backbone) if self.reader is None else self.reader.unread
        self.encoder = EncoderHooks(anatomy, pruner.encoder_layers if unread is None else ())
        self.lengths: dict[str, list[int]] = {}
        self.outputs: dict[str, Any] = {}  # of a stock model's encoding, by modality
        self.selections: dict[str, list[Selection | None]] = {}  # of each item that was encoded, by modality
        self.input_ids: Int[Tensor, "B T"] | None = None
        self.is_encoding = False

    def take_hold(self, stack: ExitStack) -> None:
        """Put methods of the same names on the instance, in front of those of its class; the stack removes them."""
        self.encoder.take_hold(stack)
        model, backbone = self.anatomy.model, self.anatomy.backbone
        replaced(stack, model, "generate", self._generate(model.generate))
        if self.reader is None:
            replaced(stack, backbone, "connect_media", self._connect_media)
            return
        self.reader.take_hold(stack)
        for modality in self.anatomy.placeholders:
            own = getattr(backbone, f"get_{modality}_features")
            replaced(stack, backbone, f"get_{modality}_features", self._get_features(modality, own))

    def start(self, input_ids: Int[Tensor, "B T"] | None) -> None:
        """Begin with other media: those of these texts."""
        self.input_ids = input_ids
        self.selections, self.lengths, self.outputs = {}, {}, {}
        self.encoder.forget()

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
        # Since then, sides of a pair that share pictures may have put them at several places.
        repeated = {
            modality: [len(item) for item in outputs.pooler_output] for modality, outputs in self.outputs.items()
        }
        lengths, self.lengths, self.outputs = self.lengths | repeated, {}, {}
        return {
            modality: self._pictures(modality, own, self.input_ids) for modality, own in (given or lengths).items()
        }

    def _generate(self, own: Callable) -> Callable:
        @wraps(own)
        def generate(inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
            self._check_chunks(kwargs)
            # Which encodes media before the first forward.
            self.start(kwargs.get("input_ids") if inputs is None else inputs)
            return own(inputs, *args, **kwargs)

        return generate

    def _check_chunks(self, kwargs: Mapping[str, Any]) -> None:
        """Where tokens leave between layers, all of a picture's have to come at once."""
        config = kwargs.get("generation_config") or self.anatomy.model.generation_config
        size = kwargs.get("prefill_chunk_size", config.prefill_chunk_size)
        if size is not None and self.pruner.cuts(len(self.anatomy.layers)):
            raise OptionError(
                f"prefill_chunk_size = {size}, under a {type(self.pruner).__name__}, which cuts between layers",
                expected="a prompt that is read at once, not in chunks",
                do="generate without `prefill_chunk_size`, or under a pruner without cuts, such as visionzip",
            )

    def _connect_media(self, media: Media, features: EncoderFeatures) -> Any:
        connected = type(self.anatomy.backbone).connect_media(self.anatomy.backbone, media, features)
        if media.modality not in self.anatomy.placeholders:
            return connected
        vectors = list(connected)
        encoding = composed_encoding(self.anatomy.backbone, media, features, vectors)
        vectors = self._pruned(self.encoder.items(media.modality, vectors, encoding))
        places = range(len(vectors)) if media.places is None else media.places.tolist()
        self.lengths[media.modality] = [len(vectors[item]) for item in places]
        chosen = self.selections.get(media.modality, [])
        self.selections[media.modality] = [chosen[item] for item in places]
        return torch.stack(vectors) if isinstance(connected, Tensor) else vectors

    def _get_features(self, modality: str, own: Callable) -> Callable:
        @wraps(own)  # `generate` reads its signature
        def get_features(*args: Any, **kwargs: Any) -> Any:
            if self.is_encoding:  # Qwen3-VL reads videos as images
                return own(*args, **kwargs)
            self.is_encoding = True
            try:
                outputs = self._encode(own, args, kwargs)
            finally:
                self.is_encoding = False
            connected = outputs.pooler_output
            self.lengths[modality] = [len(one) for one in connected]
            lengths = self._pictures(modality, self.lengths[modality], self.input_ids)
            vectors = list(torch.cat(list(connected)).split(lengths))
            arguments = signature(own).bind_partial(*args, **kwargs).arguments
            assert self.reader is not None
            encoding = self.reader.encoding(modality, arguments, lengths)
            pruned = torch.cat(self._pruned(self.encoder.items(modality, vectors, encoding)))
            is_tensor = isinstance(connected, Tensor)
            outputs.pooler_output = (
                pruned.view_as(connected) if is_tensor else list(pruned.split(self.lengths[modality]))
            )
            self.outputs[modality] = outputs
            return outputs

        return get_features

    def _encode(self, own: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        assert self.reader is not None
        self.reader.start()
        self.encoder.forget()
        return own(*args, **kwargs)

    def _pictures(self, modality: str, lengths: list[int], input_ids: Int[Tensor, "B T"] | None) -> list[int]:
        """How many vectors each picture has, where the model gives them in other portions, of these lengths."""
        lengths = [length for length in lengths if length]  # SmolVLM: rows without pictures
        if self.reader is None or input_ids is None:
            return lengths
        model_type, token = self.anatomy.model.config.model_type, self.anatomy.placeholders[modality]
        found = picture_lengths(model_type, input_ids, token)
        return lengths if found is None or sum(found) != sum(lengths) else found

    def _pruned(self, items: list[Item]) -> list[MediaVectors]:
        num_layers = len(self.anatomy.layers)
        chosen = [self.pruner.select(item, num_layers) for item in items]
        self.selections |= {item.kind: chosen for item in items}
        return [marked(item.vectors, one, self.pruner.positions) for item, one in zip(items, chosen, strict=True)]


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
