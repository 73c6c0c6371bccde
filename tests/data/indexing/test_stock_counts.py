"""Tokens of rows under stock processors: counted as encoded, in worker processes too, and never above their bound."""

import json

import numpy as np
import pytest
from PIL import Image

from mllm.data.indexing.index import open_index
from mllm.data.indexing.token_bounds import token_bounds
from mllm.data.indexing.token_counts import count_tokens, fingerprint
from mllm.data.sources import Source
from mllm.processing.stock import StockProcessor
from mllm.testing_checkpoints import save_stock_checkpoint

FAMILIES = ("llava", "llava_onevision", "internvl", "idefics3", "gemma3", "qwen2_5_vl", "qwen2_audio")
WORDS = ("a red 3", "\n\nMore", "<image>", "Grüße", "")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Rows with 0, 1 and 2 images of many sizes, and words that could share tokens with what stands around them."""
    root, random = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    lines = []
    for number in range(30):
        media = []
        for item in range(number % 3):
            height, width = (int(side) for side in random.integers(8, 90, 2))
            Image.new("RGB", (width, height)).save(root / f"{number}-{item}.png")
            media.append({"kind": "image", "path": f"{number}-{item}.png", "height": height, "width": width})
        text = {"type": "text", "text": WORDS[number % len(WORDS)]}
        question = {"role": "user", "content": [*({"type": "image"} for _ in media), text]}
        system = [{"role": "system", "content": "Look."}] if number % 4 == 0 else []
        answer = {"role": "assistant", "content": "No, there is none."}
        lines.append({"id": number, "source": "s", "messages": [*system, question, answer], "media": media})
    path = root / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return open_index(Source(path))


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_equal_encoding_and_stay_below_their_bound(family, index, tmp_path):
    processor = StockProcessor.from_pretrained(save_stock_checkpoint(tmp_path, family))
    readable = [row for row in index if {item.kind for item in row.media} <= set(processor.media_kinds)]
    assert len(readable) == (10 if family == "qwen2_audio" else 30)
    encoded = {
        row.id: len(processor.encode_chat(row.messages, media_sizes=[item.size for item in row.media]).input_ids)
        for row in readable
    }
    counts, bounds = count_tokens(index, processor), token_bounds(index, processor)
    assert [encoded.get(row.id, 0) for row in index] == counts.tolist()
    assert (counts <= bounds).all()


@pytest.mark.slow
def test_two_processes_count_the_same(index, tmp_path):
    """A processor of a class that is made here travels to other processes."""
    processor = StockProcessor.from_pretrained(save_stock_checkpoint(tmp_path, "internvl"))
    alone = count_tokens(index, processor).tolist()
    (index.derived_dir / f"tokens-{fingerprint(processor)[:32]}.npy").unlink()
    assert count_tokens(index, processor, workers=2).tolist() == alone
