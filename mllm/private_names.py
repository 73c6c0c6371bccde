"""The private names of other libraries that mllm touches, as data.

A leading underscore means that a release may rename the thing without a word. What we read, call or override all the
same is listed here with its reason. tests/project/test_private_names.py checks, on the oldest and the newest supported
releases, that each name exists and is still used, and that no other is.
"""

from typing import NamedTuple


class PrivateName(NamedTuple):
    """A private name, e.g. `PrivateName("transformers", "PreTrainedModel._init_weights", "overridden to ...")`."""

    module: str
    attribute: str
    reason: str


PRIVATE_NAMES = (
    PrivateName("transformers", "PreTrainedModel._gradient_checkpointing_func", "checkpoints parts of a model"),
    PrivateName("transformers", "PreTrainedModel._supports_attention_backend", "our models hand attention on"),
    PrivateName("transformers", "PreTrainedModel._supports_flash_attn", "our models hand attention on"),
    PrivateName("transformers", "PreTrainedModel._supports_flex_attn", "our models hand attention on"),
    PrivateName("transformers", "PreTrainedModel._supports_sdpa", "our models hand attention on"),
    PrivateName("transformers", "PreTrainedModel._tied_weights_keys", "the head may be the text embedding"),
    PrivateName(
        "transformers", "GenerationMixin._expand_multimodal_outputs", "repeats media with their rows, sounds too"
    ),
    PrivateName(
        "transformers", "PreTrainedConfig._attn_implementation", "pruners read queries and keys under another one"
    ),
    PrivateName("transformers", "ProcessorMixin._get_arguments_from_pretrained", "loads only the parts there are"),
    PrivateName("transformers", "ProcessorMixin._process_images", "images in tiles, and what stands for each"),
    PrivateName("transformers", "ProcessorMixin._process_audio", "splits sounds into windows, in stock calls too"),
    PrivateName("transformers", "InternVLProcessor._get_num_multimodal_tokens", "number of tiles of an image"),
    PrivateName(
        "transformers", "Trainer._get_grad_norm", "gradients that are no numbers stop the run before the step"
    ),
    PrivateName("transformers", "Trainer._get_output_dir", "checkpoints are written beside their place, then renamed"),
    PrivateName("transformers", "Trainer._prepare_inputs", "brings a batch of validation to the model's device"),
    PrivateName("transformers", "Trainer._save", "weights or adapter, processor and run.json; no pickled arguments"),
    PrivateName("transformers", "Trainer._save_checkpoint", "a checkpoint gets its name when it is complete"),
)
