"""The memory estimate counts what goes through the encoders and connectors of all kinds of media."""

import pytest
import torch

from mllm.data.collate import Collated, PaddingCollator
from mllm.data.examples import Examples
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.models.parts import apply_modes
from mllm.testing import tiny_model
from mllm.testing_media import save_tiny_media_rows
from mllm.training.arguments import build_arguments
from mllm.training.preflight.connectors import connector_layers, num_views
from mllm.training.preflight.estimate import estimate_memory, layers_of_parts
from mllm.training.preflight.memory import batch_bytes

WIDE, TEXT = 32, 32
"""Of the tiny encoders' features, and of the language model."""
QFORMER = {
    "type": "qformer", "num_queries": 3, "layers": 2, "hidden_size": 16, "heads": 2, "intermediate_size": 20,
    "cross_attention_frequency": 1,
}  # fmt: skip
TOWERS = {
    "image": {"tiles": {"type": "llava_next", "max_tiles": 4}, "connector": "patch_merge"},
    "audio": {"connector": {"type": "pool", "size": 2}},
    "video": {"connector": {**QFORMER, "per": "item", "positions": 8}, "frames": "fps:2:2:8"},
}
TRAINED = {"image.connector": "full", "audio.connector": "full", "video.connector": "full"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("parts"), **TOWERS)


@pytest.fixture(scope="module")
def batch(parts, tmp_path_factory) -> dict:
    """Of three images, two sounds and three videos."""
    rows = save_tiny_media_rows(tmp_path_factory.mktemp("media") / "rows", ("iav", "ii", "va", "v"))
    examples = Examples(open_mixture(read_mixture([str(rows)])), parts[1])
    return PaddingCollator(parts[1])([examples[number] for number in range(4)])


def _estimate(composed, batch, tmp_path, **options):
    settled = {"model": "model", "data": ["rows"], "output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    args = build_arguments({**settled, "parts": TRAINED, **options}, where="the test")
    model = composed[0]
    layers = layers_of_parts(model, args)
    return estimate_memory(args, model, apply_modes(model, args.parts), layers, Collated(batch, (), {}))


def _numbers(kind: str, parts, batch, tmp_path) -> tuple[int, int]:
    """What the connector of this kind keeps of one view or item, and how many of them there are."""
    model = parts[0]
    settled = {"model": "model", "data": ["rows"], "output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    layers = layers_of_parts(model, build_arguments(settled, where="the test"))
    found, count = connector_layers(kind, model.model.towers[kind], layers[f"{kind}.connector"], batch)
    return sum(found.widths), count


def test_a_connector_that_merges_patches_has_fewer_vectors_than_features(parts, batch, tmp_path):
    """Of 2 x 2 patches one vector, four times as wide."""
    numbers, count = _numbers("image", parts, batch, tmp_path)
    assert numbers == (4 * WIDE + TEXT) + (TEXT + TEXT)
    assert count == len(batch["pixel_values"]) > 3


def test_a_connector_that_pools_has_half_as_many(parts, batch, tmp_path):
    rule = parts[1].rule("audio")
    numbers, count = _numbers("audio", parts, batch, tmp_path)
    assert numbers == -(-rule.features // 2) * ((WIDE + TEXT) + (TEXT + TEXT))
    assert count == len(batch["input_features"])


def test_a_qformer_reads_all_frames_of_a_video_with_as_many_queries(parts, batch, tmp_path):
    """In each of two layers: query, key, value and output among the queries, the same again of which key and value
    read the features, and two of the feed-forward layers; then the projection."""
    frames = int(batch["video_sizes"].max())
    features = frames * parts[1].rule("video").features
    among = 4 * 3 * (16 + 16)
    across = 2 * 3 * (16 + 16) + 2 * features * (WIDE + 16)
    inside = 3 * (16 + 20) * 2
    numbers, count = _numbers("video", parts, batch, tmp_path)
    assert abs(numbers - (2 * (among + across + inside) + 3 * (16 + TEXT))) < 2  # shared out over two layers
    assert count == 3


def test_frames_go_through_the_image_encoder(parts, batch, tmp_path):
    """A frozen encoder keeps nothing; its widest layer counts, which reads frames and tiles in one call."""
    without = {name: one for name, one in batch.items() if name not in ("pixel_values_videos", "video_sizes")}
    less = {**without, "input_ids": batch["input_ids"]}
    trained = {"parts": {"image.encoder": "full", "image.connector": "full"}}
    all_of_it = _estimate(parts, batch, tmp_path, **trained).activations
    tiles_alone = _estimate(parts, less, tmp_path, **trained).activations
    frames = len(batch["pixel_values_videos"])
    layer = 3 * 4 * 4  # bytes
    assert all_of_it - tiles_alone > frames * 4 * WIDE * layer
    assert num_views("video", batch) == frames and num_views("video", less) == 0


def test_cached_features_spare_the_encoders_and_not_the_connectors(parts, batch, tmp_path):
    plain = _estimate(parts, batch, tmp_path)
    cached = _estimate(parts, batch, tmp_path, feature_cache="features")
    assert 0 < cached.activations <= plain.activations
    values = [batch[name] for name in ("pixel_values", "input_features", "pixel_values_videos")]
    views = sum(num_views(kind, batch) * _features(parts, kind) for kind in ("image", "audio", "video"))
    spared = sum(one.numel() * 4 for one in values)
    assert cached.batch == batch_bytes(batch) - spared + 4 * WIDE * views


def _features(parts, kind: str) -> int:
    rule = parts[1].rule(kind)
    return rule.views((1, 1))[0] if kind == "image" else rule.features


def test_a_batch_without_media_needs_none_of_it(parts, batch, tmp_path):
    texts = {name: one for name, one in batch.items() if name in ("input_ids", "labels", "attention_mask")}
    none = _estimate(parts, texts, tmp_path)
    some = _estimate(parts, batch, tmp_path)
    assert none.activations == 0 < some.activations
    assert none.weights == some.weights
    assert torch.is_tensor(texts["labels"])
