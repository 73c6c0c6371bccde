"""From messages and media files to token ids, loss weights and pixels."""

from mllm.processing.processor import MllmProcessor
from mllm.processing.stock import StockProcessor

TrainingProcessor = MllmProcessor | StockProcessor
"""What data and training take: of a model that was composed here, or of a stock one."""

__all__ = ["MllmProcessor", "StockProcessor", "TrainingProcessor"]
