"""mllm: build, tune, shrink, serve and ship multimodal language models.

Importing it registers our classes with transformers' Auto classes, and does nothing else.
"""

from mllm.load import load_model, load_processor
from mllm.models import MllmConfig, MllmForConditionalGeneration
from mllm.processing import MllmProcessor
from mllm.version import __version__

__all__ = [
    "MllmConfig",
    "MllmForConditionalGeneration",
    "MllmProcessor",
    "__version__",
    "load_model",
    "load_processor",
]
