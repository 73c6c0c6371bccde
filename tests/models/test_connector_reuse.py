"""A connector that was trained on pictures connects sounds, for encoders of one space (Video-LLaMA's audio branch)."""

from pathlib import Path

import pytest
import torch

from mllm.assemble import assemble, assemble_checkpoint
from mllm.errors import CompositionError, OptionError
from mllm.testing import save_tiny_parts

QFORMER = {
    "type": "qformer", "num_queries": 4, "layers": 2, "hidden_size": 16, "heads": 2, "intermediate_size": 32,
    "cross_attention_frequency": 1, "dropout": 0.0, "per": "item", "positions": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict:
    """The encoders of pictures and of sounds have one width, as in a common space."""
    return save_tiny_parts(tmp_path_factory.mktemp("parts"), audio={})


@pytest.fixture(scope="module")
def seeing(parts, tmp_path_factory) -> Path:
    """A model for pictures and videos, saved as after training."""
    options = {name: parts[name] for name in ("language_model", "image")}
    return assemble_checkpoint(
        tmp_path_factory.mktemp("runs") / "vision", **options, video={"connector": QFORMER}, seed=5
    )


def test_its_weights_are_those_of_the_trained_one(parts, seeing):
    source = {"model": str(seeing), "modality": "video"}
    audio = {"encoder": parts["audio"]["encoder"], "window_seconds": 0.5, "clips": 8, "connector_from": source}
    model, processor = assemble(language_model=parts["language_model"], audio=audio)
    trained, _ = assemble(
        **{name: parts[name] for name in ("language_model", "image")}, video={"connector": QFORMER}, seed=5
    )
    expected = trained.model.video_tower.connector.state_dict()
    found = model.model.audio_tower.connector.state_dict()
    assert found.keys() == expected.keys() and len(found) > 10
    assert all(torch.equal(found[name], expected[name]) for name in found)
    # The whole layout of Video-LLaMA: eight clips of any sound become as many vectors as there are queries.
    assert processor.expansion((100.0,)).runs == (4,)
    assert model.config.audio_config.connector == trained.config.video_config.connector


def test_it_does_to_features_what_it_did_before(parts, seeing):
    """Same features in, same vectors out, whatever they are features of."""
    source = {"model": str(seeing), "modality": "image"}
    audio = {"encoder": parts["audio"]["encoder"], "connector_from": source}
    both, _ = assemble(**{name: parts[name] for name in ("language_model", "image")}, audio=audio, seed=0)
    features = torch.randn(2, 5, 32)
    trained, _ = assemble(**{name: parts[name] for name in ("language_model", "image")}, seed=5)
    torch.testing.assert_close(both.model.audio_tower.connect(features), trained.model.image_tower.connect(features))
    assert not torch.equal(both.model.audio_tower.connect(features), both.model.image_tower.connect(features))


@pytest.mark.parametrize(
    ("source", "connector", "error", "match"),
    [
        ({"model": "here"}, None, OptionError, "a mapping with model and modality"),
        ({"model": "here", "modality": "audio"}, None, CompositionError, "no audio connector\nexpected: one of image"),
        ({"model": "here", "modality": "image"}, "linear", CompositionError, "the same type and options"),
    ],
)
def test_what_cannot_be_reused_is_said(parts, seeing, source, connector, error, match):
    source = {**source, "model": str(seeing)}
    audio = {"encoder": parts["audio"]["encoder"], "connector_from": source, "connector": connector}
    with pytest.raises(error, match=match):
        assemble(language_model=parts["language_model"], audio=audio)


def test_another_width_is_refused(parts, seeing, tmp_path):
    other = save_tiny_parts(tmp_path, audio={"encoder": "clap"})
    audio = {**other["audio"], "connector_from": {"model": str(seeing), "modality": "image"}}
    with pytest.raises(CompositionError, match=r"from \(32,\) to 32\n.*from \(16,\) to 32"):
        assemble(language_model=parts["language_model"], audio=audio)
