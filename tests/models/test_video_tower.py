"""Video towers: how they are composed, what they refuse, and that what they make follows from the frames alone."""

import pytest
import torch

from mllm import load_model, load_processor
from mllm.assemble import assemble, assemble_checkpoint
from mllm.errors import CompositionError, OptionError, RowError
from mllm.models.connectors import num_parameters
from mllm.models.parts import PartOptions, apply_modes, parts_of
from mllm.sizes import num_tokens
from mllm.testing import save_tiny_parts, tiny_model, tiny_tokenizer

QFORMER = {
    "type": "qformer", "num_queries": 3, "layers": 2, "hidden_size": 16, "heads": 2, "intermediate_size": 32,
    "cross_attention_frequency": 1, "dropout": 0.0,
}  # fmt: skip
VIDEO_LLAMA = {
    "image": {"connector": QFORMER},
    "video": {
        "connector": {**QFORMER, "per": "item", "positions": 6},
        "frames": "fps:2:2:64",
        "through_image_connector": True,
    },
}
SIZE = (24, 32, 60, 3.0)


@pytest.mark.parametrize("encoder", ["clip_vision_model", "siglip_vision_model"])
@pytest.mark.parametrize(
    "parts",
    [
        {"video": {"connector": "mlp"}},
        {"video": {"connector": {"type": "pool", "over": "grid", "size": 2}, "frames": "uniform:5"}},
        {"video": {"connector": {**QFORMER, "per": "item", "positions": 8}}},
        {"image": {"connector": QFORMER}, "video": {"connector": "identity", "through_image_connector": True}},
        VIDEO_LLAMA,
    ],
    ids=["mlp", "pool", "qformer", "shared", "video_llama"],
)
def test_counts_are_what_comes_out_of_it_saved_and_loaded(tmp_path, encoder, parts):
    out = assemble_checkpoint(tmp_path / "model", **save_tiny_parts(tmp_path, encoder=encoder, **parts))
    model, processor = load_model(out), load_processor(out)
    frames = len(processor.frame_times(SIZE))
    pixels = torch.randn(2 * frames, 3, 16, 16)
    sizes = torch.tensor([frames, frames])
    vectors = model.get_video_features(pixels, sizes).pooler_output
    assert [len(one) for one in vectors] == [num_tokens(SIZE, processor.rule("video"))] * 2
    config = model.config.video_config
    assert num_parameters(config) == sum(one.numel() for one in model.model.video_tower.parameters())
    fresh = assemble(**save_tiny_parts(tmp_path, encoder=encoder, **parts))[0]
    for one, other in zip(vectors, fresh.get_video_features(pixels, sizes).pooler_output, strict=True):
        # The same weights elsewhere in memory: a product of a matrix and a vector may round in another way.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    weights = fresh.state_dict()
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])] == []


def test_a_video_tower_has_no_encoder_of_its_own(tmp_path):
    model = tiny_model(tmp_path, video={})[0]
    assert model.config.video_config.encoder_config is None
    assert list(parts_of(model)) == ["image.encoder", "image.connector", "video.connector", "text"]


def test_frames_through_the_image_connector_are_its_images(tmp_path):
    """One frame is connected as an image is, and then as a video: a still picture is a video of one frame."""
    model = tiny_model(tmp_path, **VIDEO_LLAMA)[0]
    pixels = torch.randn(5, 3, 16, 16)
    images = model.get_image_features(pixels).pooler_output
    expected = [model.model.video_tower.connect(part, torch.tensor([len(part)]))[0] for part in images.split([2, 3])]
    found = model.get_video_features(pixels, torch.tensor([2, 3])).pooler_output
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_frames_are_asked_about_what_their_video_is(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "words")
    asked = {**QFORMER, "type": "instruct_qformer", "tokenizer": str(tmp_path / "words"), "max_question_tokens": 16}
    video = {**VIDEO_LLAMA["video"], "connector": {"type": "linear"}}
    model, processor = tiny_model(tmp_path, image={"connector": asked}, video=video)
    with torch.no_grad():  # fresh ones hardly read the question
        for parameter in model.model.image_tower.connector.parameters():
            parameter.normal_(std=0.3)
    conversations = [
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}]
        for text in ("a", "What moves?")
    ]
    questions = processor.encode_questions(conversations)
    pixels = torch.randn(1, 3, 16, 16).expand(5, -1, -1, -1)
    ids, mask = questions["video_question_ids"], questions["video_question_mask"]
    found = torch.cat(
        model.get_video_features(
            pixels, torch.tensor([2, 3]), video_question_ids=ids, video_question_mask=mask
        ).pooler_output
    )
    images = model.get_image_features(pixels[:2], image_question_ids=ids, image_question_mask=mask).pooler_output
    expected = model.model.video_tower.connector(images[[0, 0, 1, 1, 1]]).flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found[:3] - found[-3:]).abs().max() > 1e-2


def test_videos_train_the_image_connector_that_they_pass(tmp_path):
    model = tiny_model(tmp_path, **VIDEO_LLAMA)[0]
    model = apply_modes(model, {"image.connector": PartOptions("full"), "video.connector": PartOptions("full")})
    (vectors,) = model.get_video_features(torch.randn(4, 3, 16, 16), torch.tensor([4])).pooler_output
    vectors.sum().backward()
    trained = {name.split(".")[1] for name, one in model.named_parameters() if one.grad is not None and one.grad.any()}
    assert trained == {"image_tower", "video_tower"}


def test_the_order_of_frames_is_seen_by_positions_alone(tmp_path):
    model = tiny_model(tmp_path, **VIDEO_LLAMA)[0]
    with torch.no_grad():  # fresh ones hardly tell one feature from another
        for parameter in model.model.video_tower.parameters():
            parameter.normal_(std=0.5)
    pixels, sizes = torch.randn(4, 3, 16, 16), torch.tensor([4])
    forward, backward = (model.get_video_features(one, sizes).pooler_output[0] for one in (pixels, pixels.flip(0)))
    assert (forward - backward).abs().max() > 1e-4
    with torch.no_grad():
        model.model.video_tower.connector.positions.weight.zero_()
    forward, backward = (model.get_video_features(one, sizes).pooler_output[0] for one in (pixels, pixels.flip(0)))
    torch.testing.assert_close(forward, backward, rtol=0, atol=1e-5)


def test_more_frames_than_the_table_holds_are_an_error(tmp_path):
    model, processor = tiny_model(tmp_path, **VIDEO_LLAMA)
    assert len(processor.frame_times(SIZE)) == 6
    with pytest.raises(RowError, match="takes 8 frames\n.*at most 6 frames"):
        processor.encode_chat([{"role": "user", "content": [{"type": "video"}]}], media_sizes=[(24, 32, 80, 4.0)])
    for frames, message in ((7, "a video with 7 frames"), (0, "a video with 0 frames")):
        with pytest.raises(RowError, match=message):
            model.get_video_features(torch.randn(max(frames, 1), 3, 16, 16), torch.tensor([frames]))
    with pytest.raises(RowError, match="5 views of 2 items of kind video.*\n.*6 views"):
        model.get_video_features(torch.randn(5, 3, 16, 16), torch.tensor([4, 2]))


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ({"frames": "uniform:9", "connector": {"type": "linear", "positions": 8}}, "a position for each frame"),
        (
            {"connector": {"type": "patch_merge", "size": 2, "per": "item"}},
            "neighbours on a grid are those of one view",
        ),
        ({"frames": "sometimes"}, "video sampling 'sometimes'"),
        ({"conector": "mlp"}, "unknown key 'conector'"),
        ({"connector": "mlpp"}, "connector = 'mlpp'\n.*one of linear, mlp"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_is_made(tmp_path, video, message):
    with pytest.raises((CompositionError, OptionError), match=message):
        tiny_model(tmp_path, video=video)


def test_a_video_tower_needs_an_image_tower(tmp_path):
    parts = save_tiny_parts(tmp_path, audio={}, video={})
    del parts["image"]
    with pytest.raises(CompositionError, match="a video tower without an image tower"):
        assemble(**parts)
