"""The processor: one tokenizer, and at most one preprocessor for each modality."""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images

from mllm.errors import OptionError, RowError
from mllm.processing.chat import ChatEncoder, EncodedChat, Expansion, Placeholder
from mllm.processing.geometry import encode_rgb, is_square_geometry
from mllm.processing.images import decode_image
from mllm.processing.media import MediaInput
from mllm.processing.questions import encode_questions
from mllm.processing.sounds import encode_sounds, fitted_sound
from mllm.processing.tiles import encode_views, fitted_image
from mllm.processing.videos import encode_videos, most_video_tokens, video_text
from mllm.shapes import Pixels, Tensor, TokenIds
from mllm.sizes import ImageTokenRule, MediaRule, MediaSize, kind_of_size, num_tokens, read_rule

COMPONENTS = {
    "tokenizer": AutoTokenizer,
    "image_processor": AutoImageProcessor,
    "feature_extractor": AutoFeatureExtractor,
    "question_tokenizer": AutoTokenizer,
}
KINDS = ("image", "audio", "video")


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
        tokenizer: The language model's tokenizer, with the placeholders as special tokens.
        image_processor: For a model with an image or video tower.
        feature_extractor: For a model with an audio tower.
        question_tokenizer: For a model with a connector that reads what a medium is asked about.
        chat_template: Text of a template with `{% generation %}` blocks.
        end_of_turn_token: The token that ends an answer.
        rules: Of each kind of media that the model reads, how many tokens an item becomes, as `written_rule` has it.
        image_geometry: How an image or a frame was made a square: "pad", "crop" or "squash".
        image_token: The placeholder of images.
        audio_token: The placeholder of sounds.
        video_token: The placeholder of videos.
        question_tokens: Of each kind of media whose connector reads questions, how many tokens of one at most.
    """

    get_attributes = _PresentComponents()

    def __init__(
        self,
        tokenizer: Any = None,
        image_processor: Any = None,
        feature_extractor: Any = None,
        question_tokenizer: Any = None,
        *,
        chat_template: str | None = None,
        end_of_turn_token: str | None = None,
        rules: Mapping[str, Mapping[str, Any]] | None = None,
        image_geometry: str | None = None,
        image_token: str | None = "<image>",
        audio_token: str | None = "<audio>",
        video_token: str | None = "<video>",
        question_tokens: Mapping[str, int] | None = None,
    ):
        components = (tokenizer, image_processor, feature_extractor, question_tokenizer)
        for name, component in zip(COMPONENTS, components, strict=True):
            if component is not None:
                self.check_argument_for_proper_class(name, component)
                setattr(self, name, component)
        self.chat_template = chat_template
        self.end_of_turn_token = end_of_turn_token
        self.rules = {kind: dict(rule) for kind, rule in (rules or {}).items()}
        self.image_geometry = image_geometry
        # Stock code asks for them by name; None where the model does not read such media.
        self.image_token = image_token if "image" in self.rules else None
        self.audio_token = audio_token if "audio" in self.rules else None
        self.video_token = video_token if "video" in self.rules else None
        self.question_tokens = dict(question_tokens or {})
        self._encoder: ChatEncoder | None = None
        self._rules: dict[str, MediaRule] = {kind: read_rule(rule) for kind, rule in self.rules.items()}

    @property
    def image_token_id(self) -> int | None:
        """Id of the image placeholder; None without images."""
        return None if self.image_token is None else self.tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def media_kinds(self) -> tuple[str, ...]:
        """The kinds of media that the model reads."""
        return tuple(kind for kind in KINDS if kind in self.rules)

    @property
    def placeholders(self) -> dict[str, str]:
        """The token that stands for each kind's feature vectors."""
        return {kind: getattr(self, f"{kind}_token") for kind in self.media_kinds}

    @property
    def media_tokens(self) -> tuple[str, ...]:
        """The tokens that stand for media."""
        return tuple(self.placeholders.values())

    @property
    def sampling_rate(self) -> int | None:
        """Samples a second that sounds are decoded at; None for a model without sounds."""
        return self.rule("audio").sampling_rate if "audio" in self.rules else None

    def rule(self, kind: str) -> Any:
        """How many tokens a medium of a kind that the model reads becomes: a `MediaRule`, that of the kind."""
        return self._rules[kind]

    @property
    def image_token_rule(self) -> ImageTokenRule | None:
        """How many tokens an image becomes; None without images."""
        return self.rule("image") if "image" in self.rules else None

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        media_sizes: Sequence[MediaSize] = (),
        add_generation_prompt: bool = False,
        where: str = "the conversation",
    ) -> EncodedChat:
        """Messages to ids, loss weights and media spans; no file is opened.

        Args:
            messages: See `ChatEncoder.encode`.
            media_sizes: Of each media item, in order of appearance.
            add_generation_prompt: Whether to end with the template's opening of an answer.
            where: Names the row in errors.

        Raises:
            RowError: A message is malformed, media and placeholders disagree, or a medium is too large for the model.
        """
        return self.chat_encoder().encode(
            messages,
            media=[self.expansion(size, where=where) for size in media_sizes],
            add_generation_prompt=add_generation_prompt,
            where=where,
        )

    def expansion(self, size: MediaSize, *, where: str = "the conversation") -> Expansion:
        """What a medium of this size becomes in the text.

        Raises:
            RowError: The model does not read such media, or none so large.
        """
        kind = kind_of_size(size)
        if kind not in self.rules:
            raise RowError(
                f"{where}: {kind}, which the model does not read",
                expected=f"media of kind {', '.join(self.media_kinds) or 'text alone'}",
                do="drop the row, or train another model on it",
            )
        try:
            if kind == "video":
                return video_text(size, self.rule("video"), str(self.video_token))
            return Expansion(kind, self.placeholders[kind], (num_tokens(size, self.rule(kind)),))
        except RowError as error:
            raise RowError(f"{where}: {error.found}", expected=error.expected, do=error.do) from error

    def encode_media(self, items: Sequence[MediaInput]) -> dict[str, Tensor]:
        """The model's inputs for decoded media of a batch, in order of appearance; nothing for no media."""
        by_kind = {kind: [item for item in items if item.kind == kind] for kind in self.media_kinds}
        inputs: dict[str, Tensor] = {}
        if images := by_kind.get("image"):
            pictures = [item.data for item in images]
            inputs |= encode_views(pictures, self.rule("image"), self.image_processor, self.encode_images)
        if sounds := by_kind.get("audio"):
            inputs |= encode_sounds(sounds, self.feature_extractor, self.rule("audio"))
        if videos := by_kind.get("video"):
            inputs |= encode_videos(videos, self.encode_images)
        return inputs

    def frame_times(self, size: MediaSize) -> tuple[float, ...]:
        """When the frames of a video that the model sees are shown, in seconds from its beginning."""
        return self.rule("video").times(size)

    def encode_questions(self, conversations: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Tensor]:
        """What the media of a batch are asked about, for connectors that read it; see `encode_questions`."""
        if not self.question_tokens:
            return {}
        return encode_questions(conversations, self.question_tokenizer, self.question_tokens)

    def text_inputs(self, input_ids: TokenIds) -> dict[str, Tensor]:
        """What the model wants to be told about the tokens besides their ids: nothing."""
        return {}

    def fitted(self, item: MediaInput, *, where: str) -> MediaInput:
        """The item as its tokens were counted: a sound is brought to the length that its row states.

        Images become the encoder's square whatever their row says of their size, unless they are cut into tiles; of a
        video the frames were decoded that its size asks for.

        Raises:
            MediaError: The row says another length than the file has, or of an image in tiles another size.
        """
        if item.kind == "image":
            return fitted_image(item, self.rule("image"), where=where)
        return fitted_sound(item, int(self.sampling_rate or 0), where=where) if item.kind == "audio" else item

    def media_rule(self) -> str:
        """Everything that decides how many tokens a medium has, as text."""
        return json.dumps(self.rules, sort_keys=True)

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

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        """Stock `__call__` asks for the images' inputs, and for what to write for each."""
        rule = self.image_token_rule
        if rule is None or rule.tiles is None:
            return super()._process_images(images, **kwargs)
        pictures = [decode_image(image) for image in make_flat_list_of_images(images)]
        written = [str(self.image_token) * self.num_image_tokens(image.height, image.width) for image in pictures]
        return encode_views(pictures, rule, self.image_processor, self.encode_images), written

    def _process_audio(self, audio: Sequence[Any], **kwargs) -> tuple[dict[str, Tensor], list[str]]:
        """Stock `__call__` asks for the inputs of sounds, arrays of samples, and what to write for each."""
        rate = int(self.sampling_rate or 0)
        items = [MediaInput("audio", np.asarray(one, np.float32), (len(one) / rate,)) for one in audio]
        return self.encode_media(items), [
            str(self.audio_token) * num_tokens(item.size, self.rule("audio")) for item in items
        ]

    def num_image_tokens(self, height: int, width: int) -> int:
        """How many placeholders stand for an image of this size; 0 where the model reads none."""
        return num_tokens((height, width), self.rule("image")) if "image" in self.rules else 0

    def most_tokens(self, size: MediaSize) -> int:
        """How many tokens a medium of this size becomes, a video at most; 0 for one that the model does not read."""
        if "video" in self.rules and kind_of_size(size) == "video":
            return most_video_tokens(float(size[-1]), self.rule("video"))
        try:
            expansion = self.expansion(size)
        except RowError:
            return 0
        # A token of what is written between runs is a character at least; each run was written as one placeholder.
        return sum(expansion.runs) + len(expansion.text.replace(self.placeholders[expansion.kind], ""))

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
                placeholders={kind: Placeholder(token, token) for kind, token in self.placeholders.items()},
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

        Image processors are the PIL ones, with or without torchvision: the two give different pixels.
        """
        saved = processor_dict or {}
        has_questions = bool(saved.get("question_tokens"))  # of tokenizers the file itself says nothing
        arguments: list[Any] = []
        for name, loader in COMPONENTS.items():
            if not (name == "tokenizer" or name in saved or (name == "question_tokenizer" and has_questions)):
                arguments.append(None)
                continue
            extra: dict[str, Any] = {"backend": "pil"} if name == "image_processor" else {}
            if name == "question_tokenizer":
                extra = {"subfolder": "/".join(filter(None, (kwargs.get("subfolder"), name)))}
            arguments.append(loader.from_pretrained(pretrained_model_name_or_path, **{**kwargs, **extra}))
        return arguments
