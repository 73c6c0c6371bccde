"""The parts of a model as it is trained: which there are, which modules they consist of, what is trained of each.

Composed models and stock ones alike: a part is "image.encoder", "image.connector", "audio.encoder", "audio.connector"
or "text", and everything below asks `parts_of` where it stands.
"""

from mllm.models.parts.adapters import ADAPTER, COPY, adapted_modules, copied_modules
from mllm.models.parts.checkpointing import checkpoint_parts
from mllm.models.parts.frozen import hold_frozen_encoders
from mllm.models.parts.inventory import Part, linear_modules, own_modules, part_of, parts_of
from mllm.models.parts.layers import chosen_layers, layers_of
from mllm.models.parts.modes import apply_modes, freeze_unused
from mllm.models.parts.options import FOUR_BIT, MODES, PartOptions, check_options, quantized_parts
from mllm.models.parts.quantization import four_bit_config, four_bit_modules, four_bit_names, keep_as_loaded
from mllm.models.parts.summary import PartSummary, count_elements, learning_rate_groups, summarize_parts

__all__ = [
    "ADAPTER",
    "COPY",
    "FOUR_BIT",
    "MODES",
    "Part",
    "PartOptions",
    "PartSummary",
    "adapted_modules",
    "apply_modes",
    "check_options",
    "checkpoint_parts",
    "chosen_layers",
    "copied_modules",
    "count_elements",
    "four_bit_config",
    "four_bit_modules",
    "four_bit_names",
    "freeze_unused",
    "hold_frozen_encoders",
    "keep_as_loaded",
    "layers_of",
    "learning_rate_groups",
    "linear_modules",
    "own_modules",
    "part_of",
    "parts_of",
    "quantized_parts",
    "summarize_parts",
]
