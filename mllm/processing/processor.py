"""The processor: one tokenizer, and at most one preprocessor for each modality."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    ProcessorMixin,
)

from mllm.errors import OptionError
from mllm.processing.chat import ChatEncoder, EncodedChat
from mllm.processing.geometry import encode_rgb, is_square_geometry
from mllm.processing.media import MediaInput
from mllm.shapes import Pixels, Tensor, TokenIds
from mllm.sizes import ImageTokenRule, MediaSize, num_image_tokens

RULE_FIELDS = tuple(field.name for field in dataclasses.fields(ImageTokenRule))
COMPONENTS = {
    "tokenizer": AutoTokenizer,
    "image_processor": AutoImageProcessor,
    "feature_extractor": AutoFeatureExtractor,
    "video_processor": AutoVideoProcessor,
}


class _PresentComponents:
    """`get_attributes()`, which stock code asks what to save and show: of an instance, only what it has."""

    def __get__(self, processor: "MllmProcessor | None", owner: type) -> Any:
        if processor is None:
            return lambda: list(COMPONENTS)
        return lambda: [name for name in COMPONENTS if name in vars(processor)]


class MllmProcessor(ProcessorMixin):
    """Text and media to model inputs.

    Stock `ProcessorMixin` wants every component; here one that is absent is not an attribute, is not saved and is not
    asked for when loading.

    Args:
        tokenizer: The language model's tokenizer, with the placeholder as a special token.
        image_processor: For a model with an image tower.
        feature_extractor: For a model with an audio tower.
        video_processor: For a model with a video tower.
        chat_template: Text of a template with `{% generation %}` blocks.
        image_token: The image placeholder.
        end_of_turn_token: The token that ends an answer.
        image_size: Side of the square the image encoder sees.
        patch_size: Side of one of its patches.
        num_prefix_tokens: Tokens it puts in front of the patches.
        feature_select: "default" drops the first token, "full" keeps every one.
        image_geometry: How an image was made a square: "pad", "crop" or "squash".
    """

    get_attributes = _PresentComponents()

    def __init__(
        self,
        tokenizer: Any = None,
        image_processor: Any = None,
        feature_extractor: Any = None,
        video_processor: Any = None,
        *,
        chat_template: str | None = None,
        image_token: str | None = "<image>",
        end_of_turn_token: str | None = None,
        image_size: int | None = None,
        patch_size: int | None = None,
        num_prefix_tokens: int | None = None,
        feature_select: str | None = None,
        image_geometry: str | None = None,
    ):
        given = (tokenizer, image_processor, feature_extractor, video_processor)
        for name, component in zip(COMPONENTS, given, strict=True):
            if component is not None:
                self.check_argument_for_proper_class(name, component)
                setattr(self, name, component)
        self.chat_template = chat_template
        self.image_token = None if image_processor is None else image_token
        self.end_of_turn_token = end_of_turn_token
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_prefix_tokens = num_prefix_tokens
        self.feature_select = feature_select
        self.image_geometry = image_geometry
        self._encoder: ChatEncoder | None = None

    @property
    def image_token_id(self) -> int | None:
        """Id of the image placeholder; None without images."""
        return None if self.image_token is None else self.tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def media_kinds(self) -> tuple[str, ...]:
        """The kinds of media that the model reads."""
        return () if self.image_token is None else ("image",)

    @property
    def sampling_rate(self) -> int | None:
        """Samples a second that sounds are decoded at; None for a model without sounds."""
        return None

    @property
    def image_token_rule(self) -> ImageTokenRule | None:
        """How many tokens an image becomes; None without images."""
        if self.image_token is None:
            return None
        values: dict[str, Any] = {name: getattr(self, name) for name in RULE_FIELDS}
        if missing := [name for name, value in values.items() if value is None]:
            raise OptionError(
                f"a processor with images and without {', '.join(missing)}",
                expected=f"{', '.join(RULE_FIELDS)}, as the encoder has them",
                do="make the processor with `build_processor`",
            )
        return ImageTokenRule(**values)

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        media_sizes: Sequence[MediaSize] = (),
        add_generation_prompt: bool = False,
        where: str = "the conversation",
    ) -> EncodedChat:
        """Messages to ids, loss weights and media spans; no picture is opened.

        Args:
            messages: See `ChatEncoder.encode`.
            media_sizes: Height and width of each image, in order of appearance.
            add_generation_prompt: Whether to end with the template's opening of an answer.
            where: Names the row in errors.

        Raises:
            RowError: A message is malformed, or images and placeholders disagree.
        """
        return self.chat_encoder().encode(
            messages,
            image_lengths=[self.most_tokens(size) for size in media_sizes],
            add_generation_prompt=add_generation_prompt,
            where=where,
        )

    def encode_media(self, items: Sequence[MediaInput]) -> dict[str, Tensor]:
        """The model's inputs for decoded media of a batch, in order of appearance; nothing for no media."""
        return {"pixel_values": self.encode_images([item.data for item in items])} if items else {}

    def text_inputs(self, input_ids: TokenIds) -> dict[str, Tensor]:
        """What the model wants to be told about the tokens besides their ids: nothing."""
        return {}

    def fitted(self, item: MediaInput, *, where: str) -> MediaInput:
        """The item as it is: whatever its row says of its size, it becomes the encoder's square."""
        return item

    def media_rule(self) -> str:
        """Everything that decides how many tokens a medium has, as text."""
        return repr(self.image_token_rule)

    def encode_images(self, images: Sequence[Image.Image]) -> Pixels:
        """RGB images to pixel values, in order; equal to what the image processor itself gives, but faster."""
        settings = self.image_processor
        if is_square_geometry(settings):
            return encode_rgb(list(images), settings)
        return settings(list(images), return_tensors="pt")["pixel_values"].float()

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs) -> str:
        """Stock `__call__` asks what to write for an image: its placeholders."""
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        return str(self.image_token) * self.num_image_tokens(height, width)

    def num_image_tokens(self, height: int, width: int) -> int:
        """How many placeholders stand for an image of this size; 0 where the model reads none."""
        rule = self.image_token_rule
        return 0 if rule is None else num_image_tokens(height, width, rule)

    def most_tokens(self, size: MediaSize) -> int:
        """How many tokens a medium of this size becomes; 0 for one that the model does not read."""
        return self.num_image_tokens(*size) if len(size) == 2 else 0

    def chat_encoder(self) -> ChatEncoder:
        """Made when first needed, and again when the template or the vocabulary has changed."""
        encoder = self._encoder
        if encoder is None or not encoder.belongs_to(self.tokenizer, self.chat_template):
            if self.chat_template is None:
                raise OptionError(
                    "a processor without a chat template",
                    expected="one that `assemble` or `build_processor` made",
                    do="set `chat_template` to a template with {% generation %} blocks",
                )
            encoder = self._encoder = ChatEncoder(
                self.tokenizer,
                chat_template=self.chat_template,
                end_of_turn=self.end_of_turn_token,
                image_token=self.image_token,
            )
        return encoder

    @classmethod
    def from_args_and_dict(cls, args: list[Any], processor_dict: dict[str, Any], **kwargs) -> Any:
        """Make a processor of loaded components and saved fields. The stock method drops keyword-only parameters."""
        return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
        known = inspect.signature(cls).parameters
        given = {**processor_dict, **dict(zip(COMPONENTS, args, strict=True)), **kwargs}
        processor = cls(**{name: value for name, value in given.items() if name in known})
        unused = {name: value for name, value in given.items() if name not in known}
        return (processor, unused) if return_unused_kwargs else processor

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs
    ) -> list[Any]:
        """Load the tokenizer and the components that processor_config.json names.

        Image and video processors are the PIL ones, with or without torchvision: the two give different pixels.
        """
        saved = processor_dict or {}
        arguments: list[Any] = []
        for name, loader in COMPONENTS.items():
            if name != "tokenizer" and name not in saved:
                arguments.append(None)
                continue
            extra = {"backend": "pil"} if name == "image_processor" else {}
            arguments.append(loader.from_pretrained(pretrained_model_name_or_path, **extra, **kwargs))
        return arguments
