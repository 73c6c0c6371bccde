"""A multi-stream Q-Former in a model: its streams are an image's overview and tiles, or what several encoders see."""

import pytest
import torch
from PIL import Image

from mllm.assemble import assemble
from mllm.processing.media import MediaInput
from mllm.testing import save_tiny_parts
from mllm.testing_images import save_tiny_image_encoder

SMALL = {"layers": 3, "hidden_size": 8, "heads": 2, "intermediate_size": 10, "num_queries": 5, "num_local_queries": 2}
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]


@pytest.fixture
def parts(tmp_path):
    """Options of `assemble` with this connector."""

    def with_connector(connector: dict, **fields) -> dict:
        options = save_tiny_parts(tmp_path)
        choice = {"type": "multi_stream_qformer", **SMALL, **connector}
        return {**options, "image": {**options["image"], "connector": choice, **fields}}

    return with_connector


@torch.no_grad()
@pytest.mark.parametrize(("tiles", "place"), [("internvl", -1), ("sphinx", 0)])
def test_overview_and_tiles_are_the_streams_of_an_image(tiles, place, parts):
    """Wherever the overview stands; a small image that InternVL's rule does not cut has no local stream."""
    model, processor = assemble(**parts({"per": "item"}, tiles={"type": tiles, "separators": "none"}))
    tower = model.model.image_tower
    for parameter in tower.connector.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    sizes = [(16, 16), (16, 50), (40, 33)]
    pictures = [Image.effect_noise((width, height), 90).convert("RGB") for height, width in sizes]
    media = [MediaInput("image", picture, size) for picture, size in zip(pictures, sizes, strict=True)]
    chat = processor.encode_chat(MESSAGES * 3, media_sizes=sizes)
    inputs = processor.encode_media(media)
    found = model.get_image_features(**inputs).pooler_output
    assert [len(item) for item in found] == [span.length for span in chat.media] == [7, 7, 7]
    counts = [len(processor.rule("image").views(size)) for size in sizes]
    assert (counts[0] == 1) == (tiles == "internvl") and counts[1] > 2
    for item, views in zip(found, tower.encode(inputs["pixel_values"]).split(counts), strict=True):
        overview, local = (
            views[place][None],
            [view for number, view in enumerate(views) if number != place % len(views)],
        )
        streams = (overview, torch.cat([overview[0, :0], *local])[None])
        torch.testing.assert_close(item, tower.connector.connect(streams, None, None)[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_several_encoders_are_the_streams_of_an_image(parts, tmp_path):
    """The first of them is the global one; each has its own width."""
    options = parts({"num_streams": 3}, join="sequence")
    others = [save_tiny_image_encoder(tmp_path / name, name) for name in ("vit", "siglip_vision_model")]
    options["image"]["encoder"] = [options["image"]["encoder"], *others]
    model, processor = assemble(**options)
    inputs = processor.encode_media([MediaInput("image", Image.new("RGB", (20, 16), "red"), (16, 20))])
    (found,) = model.get_image_features(**inputs).pooler_output
    chat = processor.encode_chat(MESSAGES, media_sizes=[(16, 20)])
    assert len(found) == chat.media[0].length == 5 + 2 + 2
    tower = model.model.image_tower
    assert len(tower.config.feature_sizes) == len(tower.connector.qformer.layer[0].crossattention) == 3
