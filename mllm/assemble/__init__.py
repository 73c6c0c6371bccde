"""Join encoders, fresh connectors and a language model into one model with its processor."""

from mllm.assemble.compose import assemble, assemble_checkpoint, assembly_options
from mllm.assemble.language_model import check_text_only_equality
from mllm.assemble.options import AudioTowerOptions, ImageTowerOptions, VideoTowerOptions

__all__ = [
    "AudioTowerOptions",
    "ImageTowerOptions",
    "VideoTowerOptions",
    "assemble",
    "assemble_checkpoint",
    "assembly_options",
    "check_text_only_equality",
]
