"""No media span is cut: under every limit a row is used with all placeholders of its images, or not at all."""

import numpy as np
import pytest

from mllm import load_processor
from mllm.data.collate import PaddingCollator
from mllm.data.examples import Examples
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.errors import OptionError
from mllm.sizes import num_tokens
from mllm.testing import save_tiny_rows


def test_spans_are_whole_under_every_limit(assembled, tmp_path):
    processor = load_processor(assembled)
    path = save_tiny_rows(tmp_path / "rows", 8, num_images=lambda number: number % 4)
    rows = open_mixture(read_mixture([str(path)]))
    lengths = Examples(rows, processor).lengths.tolist()
    with pytest.raises(OptionError, match="no row left"):
        Examples(rows, processor, max_length=min(lengths) - 1)
    for limit in range(min(lengths), max(lengths) + 1):
        examples = Examples(rows, processor, max_length=limit)
        assert examples.used.tolist() == [index for index, length in enumerate(lengths) if length <= limit]
        for example in (examples[index] for index in range(len(examples))):
            expected = [num_tokens((item.height, item.width), processor.rule("image")) for item in example.row.media]
            assert int(np.sum(example.input_ids == processor.image_token_id)) == sum(expected)
    batch = PaddingCollator(processor)([examples[index] for index in range(len(examples))])
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 4 * len(batch["pixel_values"])
