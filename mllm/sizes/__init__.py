"""How many tokens a media item becomes, from its size alone. Processor, sampler and model all ask here."""

from mllm.sizes.images import ImageTokenRule
from mllm.sizes.lengths import EACH, LengthRule
from mllm.sizes.media import LONGEST_SOUND, MediaSize, kind_of_size
from mllm.sizes.rules import MediaRule, num_joined_tokens, num_tokens, num_vectors, read_rule, written_rule
from mllm.sizes.tiles import TileRule

__all__ = [
    "EACH",
    "LONGEST_SOUND",
    "ImageTokenRule",
    "LengthRule",
    "MediaRule",
    "MediaSize",
    "TileRule",
    "kind_of_size",
    "num_joined_tokens",
    "num_tokens",
    "num_vectors",
    "read_rule",
    "written_rule",
]
