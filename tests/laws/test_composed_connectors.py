"""Composed with every connector, a model gets as many vectors as placeholders, and trains all of the connector.

Rows of no, one and two images; the forward itself refuses a count that differs.
"""

from pathlib import Path

import pytest
import torch

from mllm import load_model
from mllm.assemble import assemble
from mllm.data.collate import PackingCollator, PaddingCollator
from mllm.data.examples import Examples
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.models.connectors import CONNECTORS, num_parameters
from mllm.models.parts import PartOptions, apply_modes
from mllm.models.segment_attention import isolate_segments
from mllm.testing import save_tiny_parts, save_tiny_rows, tiny_tokenizer

QFORMER = {"layers": 2, "hidden_size": 8, "heads": 2, "intermediate_size": 10, "num_queries": 3, "dropout": 0.0}
CHOICES = {
    "linear": {},
    "mlp": {"layers": 3},
    "patch_merge": {},
    "pool": {"over": "grid"},
    "frame_stack": {"size": 3},
    "perceiver": {"num_latents": 3, "depth": 1, "heads": 4, "head_size": 4},
    "identity": {},
    "streams": {},
    "qformer": QFORMER,
    "instruct_qformer": QFORMER,
    "windowed_qformer": {**QFORMER, "window": 3},
    "multi_stream_qformer": {**QFORMER, "num_local_queries": 2, "per": "item"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Tiny parts, the tokenizer of questions, and rows."""
    directory = tmp_path_factory.mktemp("parts")
    tiny_tokenizer("gpt_neox").save_pretrained(directory / "words")
    save_tiny_rows(directory / "rows", 6, num_images=lambda number: number % 3)
    return directory


@pytest.fixture(scope="module")
def parts(root) -> dict:
    return save_tiny_parts(root)


@pytest.fixture
def composed(request, root, parts):
    """A model with the connector of this name, and its processor."""
    connector = {"type": request.param, **CHOICES[request.param]}
    if request.param == "instruct_qformer":
        connector["tokenizer"] = str(root / "words")
    tiles = {"tiles": "sphinx"} if request.param == "multi_stream_qformer" else {}
    return assemble(**{**parts, "image": {**parts["image"], "connector": connector, **tiles}})


@pytest.mark.parametrize("composed", CONNECTORS, indirect=True)
def test_counted_trained_packed_saved_and_loaded(composed, root, tmp_path):
    model, processor = composed
    rows = Examples(open_mixture(read_mixture([str(root / "rows" / "rows.jsonl")])), processor)
    examples = [rows[number] for number in range(6)]
    batch = PaddingCollator(processor)(examples)
    config = model.config.image_config
    connector = model.model.image_tower.connector
    assert num_parameters(config) == sum(one.numel() for one in connector.parameters())

    apply_modes(model, {"image.connector": PartOptions("full")})
    loss = model.train()(**batch).loss
    loss.backward()
    assert not [name for name, one in connector.named_parameters() if one.grad is None]

    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = load_model(tmp_path).eval()(**batch).loss
        torch.testing.assert_close(loaded, model(**batch).loss, rtol=0, atol=1e-6)
        isolate_segments(model, longest=200)
        packed = model(**PackingCollator(processor)(examples), use_cache=False).loss
    torch.testing.assert_close(packed, loaded, rtol=0, atol=1e-5)


def test_every_connector_of_the_table_is_composed():
    assert CHOICES.keys() == CONNECTORS.keys()
