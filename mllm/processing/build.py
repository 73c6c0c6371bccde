"""Build the processor of a model that is being composed."""

from transformers import AutoImageProcessor, BaseImageProcessor, LlavaImageProcessorPil, PreTrainedTokenizerBase
from transformers.models.auto.image_processing_auto import get_image_processor_config

from mllm.errors import CompositionError, OptionError
from mllm.processing.chat import ChatEncoder
from mllm.processing.control import add_placeholder
from mllm.processing.geometry import llava_image_processor
from mllm.processing.processor import MllmProcessor
from mllm.processing.template_check import check_template
from mllm.processing.templates import choose_template
from mllm.sizes import ImageTokenRule

COLOURS = ("image_mean", "image_std", "resample", "rescale_factor", "do_rescale", "do_normalize")

__all__ = ["add_placeholder", "build_processor", "load_image_processor"]


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
            f"image_encoder = {path!r}, whose image processor needs torchvision and does not state its colours",
            expected="a preprocessor_config.json with image_mean and image_std",
            do="install torchvision, or choose another encoder",
        ) from error


def build_processor(
    tokenizer: PreTrainedTokenizerBase,
    image_processor: BaseImageProcessor | None,
    *,
    rule: ImageTokenRule | None,
    geometry: str = "pad",
    chat_template: str | None = None,
    image_token: str = "<image>",
) -> MllmProcessor:
    """Join a tokenizer and an encoder's preprocessing into one processor, with a template that was tried out on both.

    Args:
        tokenizer: Has `image_token` as a special token already, see `add_placeholder`.
        image_processor: The encoder's own; its colours and filter are kept, its geometry is replaced.
        rule: How many tokens an image becomes; None where there are no images.
        geometry: "pad", "crop" or "squash".
        chat_template: A name or a text, see `choose_template`.
        image_token: The image placeholder.

    Raises:
        OptionError: An option has no such value, or template and tokenizer do not work together.
    """
    if image_processor is not None and image_token not in tokenizer.get_added_vocab():
        raise OptionError(
            f"a tokenizer without {image_token!r}",
            expected="the placeholder as one special token",
            do="call `add_placeholder` first",
        )
    template = choose_template(tokenizer, chat_template, image_token=image_token)
    encoder = ChatEncoder(
        tokenizer,
        chat_template=template.text,
        end_of_turn=template.end_of_turn,
        image_token=None if image_processor is None else image_token,
    )
    end_of_turn = check_template(encoder, template.end_of_turn)
    images: dict = {}
    if image_processor is not None and rule is not None:
        images = {
            "image_processor": llava_image_processor(image_processor, image_size=rule.image_size, geometry=geometry),
            "image_token": image_token,
            "image_size": rule.image_size,
            "patch_size": rule.patch_size,
            "num_prefix_tokens": rule.num_prefix_tokens,
            "feature_select": rule.feature_select,
            "image_geometry": geometry,
        }
    return MllmProcessor(tokenizer, chat_template=template.text, end_of_turn_token=end_of_turn, **images)
