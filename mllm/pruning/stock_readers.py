"""The stock families that can be pruned, and what reads them on their way from encoder to language model."""

from mllm.pruning.grid_reader import GridReader, WindowReader
from mllm.pruning.stock_reader import StockReader
from mllm.pruning.tile_readers import PackAndPoolReader, PackReader, ShuffleReader, TileShuffleReader

STOCK_READERS: dict[str, type[StockReader]] = {
    "llava": StockReader,
    "llava_next": PackReader,
    "llava_onevision": PackAndPoolReader,
    "internvl": ShuffleReader,
    "smolvlm": TileShuffleReader,
    "idefics3": TileShuffleReader,
    "qwen2_5_vl": WindowReader,
    "qwen3_vl": GridReader,
}
"""By model type."""
