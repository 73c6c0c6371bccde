"""From messages and media files to token ids, loss weights and pixels."""

from mllm.processing.processor import MllmProcessor

__all__ = ["MllmProcessor"]
