"""Build the processor of a model that is being composed."""

from collections.abc import Mapping

from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    FeatureExtractionMixin,
    LlavaImageProcessorPil,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.image_processing_auto import get_image_processor_config

from mllm.errors import CompositionError, OptionError
from mllm.processing.chat import ChatEncoder, Placeholder
from mllm.processing.control import add_placeholder
from mllm.processing.geometry import llava_image_processor
from mllm.processing.processor import MllmProcessor
from mllm.processing.template_check import check_template
from mllm.processing.templates import choose_template
from mllm.sizes import MediaRule, written_rule

COLOURS = ("image_mean", "image_std", "resample", "rescale_factor", "do_rescale", "do_normalize")

PLACEHOLDERS = {"image": "<image>", "audio": "<audio>", "video": "<video>"}

__all__ = ["PLACEHOLDERS", "add_placeholder", "build_processor", "load_image_processor"]


def load_image_processor(path: str) -> BaseImageProcessor:
    """An encoder's own preprocessing, as its PIL variant: no torchvision needed, and no word about it.

    Where transformers has no such variant (DINOv3), the colours and the filter that the file states, which is all that
    `build_processor` keeps.

    Raises:
        CompositionError: There is neither a PIL variant nor a file that states the colours.
    """
    try:
        return AutoImageProcessor.from_pretrained(path, backend="pil")
    except (ImportError, ValueError) as error:
        stated = {key: value for key, value in get_image_processor_config(path).items() if key in COLOURS}
        if "image_mean" in stated and "image_std" in stated:
            return LlavaImageProcessorPil(**stated)
        raise CompositionError(
            f"image.encoder = {path!r}, whose image processor needs torchvision and does not state its colours",
            expected="a preprocessor_config.json with image_mean and image_std",
            do="install torchvision, or choose another encoder",
        ) from error


def build_processor(
    tokenizer: PreTrainedTokenizerBase,
    image_processor: BaseImageProcessor | None = None,
    feature_extractor: FeatureExtractionMixin | None = None,
    *,
    rules: Mapping[str, MediaRule],
    geometry: str = "pad",
    chat_template: str | None = None,
    tokens: Mapping[str, str] = PLACEHOLDERS,
    question_tokenizer: PreTrainedTokenizerBase | None = None,
    question_tokens: Mapping[str, int] | None = None,
) -> MllmProcessor:
    """Join a tokenizer and the encoders' preprocessing into one processor, with a template that was tried out on both.

    Args:
        tokenizer: Has the placeholders as special tokens already, see `add_placeholder`.
        image_processor: The image encoder's own; its colours and filter are kept, its geometry is replaced.
        feature_extractor: The audio encoder's own.
        rules: Of each kind of media that the model reads, how many tokens an item becomes.
        geometry: "pad", "crop" or "squash".
        chat_template: A name or a text, see `choose_template`.
        tokens: The placeholders by kind.
        question_tokenizer: See `MllmProcessor`.
        question_tokens: See `MllmProcessor`.

    Raises:
        OptionError: An option has no such value, or template and tokenizer do not work together.
    """
    placeholders = {kind: tokens[kind] for kind in rules}
    known = tokenizer.get_added_vocab()
    if missing := [token for token in placeholders.values() if token not in known]:
        raise OptionError(
            f"a tokenizer without {missing[0]!r}",
            expected="the placeholder as one special token",
            do="call `add_placeholder` first",
        )
    template = choose_template(tokenizer, chat_template, placeholders=placeholders)
    encoder = ChatEncoder(
        tokenizer,
        chat_template=template.text,
        end_of_turn=template.end_of_turn,
        placeholders={kind: Placeholder(token, token) for kind, token in placeholders.items()},
    )
    end_of_turn = check_template(encoder, template.end_of_turn)
    if image_processor is not None and "image" in rules:
        side = rules["image"].image_size
        image_processor = llava_image_processor(image_processor, image_size=side, geometry=geometry)
    return MllmProcessor(
        tokenizer,
        image_processor,
        feature_extractor,
        question_tokenizer,
        chat_template=template.text,
        end_of_turn_token=end_of_turn,
        rules={kind: written_rule(rule) for kind, rule in rules.items()},
        image_geometry=geometry if "image" in rules else None,
        **{f"{kind}_token": token for kind, token in placeholders.items()},
        question_tokens=question_tokens,
    )
