"""What can be written under `image: tiles:` in a plan, and what is refused."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from mllm import load_model
from mllm.assemble import assemble
from mllm.assemble.tiles import TILES, geometry_of, tile_rule
from mllm.errors import CompositionError, ExportError, OptionError
from mllm.export.mappings import find_target
from mllm.processing.media import MediaInput
from mllm.testing import save_tiny_parts, tiny_model


def test_a_name_stands_for_a_published_way():
    assert tile_rule(None) is None
    for name, rule in TILES.items():
        assert tile_rule(name) == tile_rule({"type": name}) == rule


def test_what_differs_is_written_beside_the_name():
    rule = tile_rule({"type": "llava_next", "grids": [[1, 2], [2, 2]], "separators": "none"})
    assert (rule.grids, rule.separators, rule.overview) == (((1, 2), (2, 2)), "none", "first")


def test_the_budget():
    assert max(rows * columns for rows, columns in tile_rule({"type": "internvl", "max_tiles": 6}).grids) == 6
    assert tile_rule({"type": "llava_next", "max_tiles": 4, "min_tiles": 4}).grids == ((4, 1), (2, 2), (1, 4))
    within = tile_rule({"type": "llava_next", "grids": [[2, 2], [1, 2], [4, 4]], "max_tiles": 4})
    assert within.grids == ((2, 2), (1, 2))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("anyres", "type = 'anyres'.*\n.*llava_next, internvl, sphinx"),
        ({"max_tiles": 4}, "type = None"),
        ({"type": "internvl", "size": 4}, "no option 'size'"),
        ({"type": "internvl", "max_tiles": 0}, "max_tiles = 0"),
        ({"type": "internvl", "max_tiles": "all"}, "max_tiles = 'all'"),
        ({"type": "internvl", "min_tiles": 4}, "min_tiles = 4"),
        ({"type": "llava_next", "grids": 4}, "grids = 4"),
        ({"type": "llava_next", "grids": [[1, 2, 3]]}, "grids = "),
        ({"type": "llava_next", "grids": [[0, 2]]}, "grids = "),
        ({"type": "llava_next", "grids": [[3, 3], [2, 3]], "max_tiles": 4}, "no grid of 1 to 4 tiles"),
        ({"type": "llava_next", "fit": "crop"}, "fit = 'crop'"),
    ],
)
def test_choices_that_are_refused(choice, message):
    with pytest.raises(OptionError, match=message):
        tile_rule(choice)


def test_the_overview_shows_the_whole_image():
    assert [geometry_of(name, None) for name in TILES] == ["squash", "squash", "pad"]
    assert geometry_of(None, None) == "pad"
    assert geometry_of("llava_next", "pad") == "pad"
    with pytest.raises(OptionError, match="'crop' with tiles"):
        geometry_of("llava_next", "crop")


def test_a_connector_without_places_cannot_fill_a_map(tmp_path):
    parts = save_tiny_parts(tmp_path)
    for connector in ({"type": "perceiver", "num_latents": 4}, {"type": "mlp", "per": "item"}):
        with pytest.raises(CompositionError, match=r"read as one map.*\n.*\n.*order: views"):
            assemble(**_with(parts, connector=connector, tiles="llava_next"))
    with pytest.raises(OptionError, match=r"5 features"):
        assemble(**_with(parts, connector="mlp", tiles="llava_next", feature_select="full"))


def test_a_table_of_positions_has_room_for_all_views(tmp_path):
    parts = save_tiny_parts(tmp_path)
    connector = {"type": "mlp", "positions": 4}
    with pytest.raises(CompositionError, match="4 positions, and tiles with up to 5 views"):
        assemble(**_with(parts, connector=connector, tiles="sphinx"))
    model, _ = assemble(**_with(parts, connector={**connector, "positions": 5}, tiles="sphinx"))
    assert model.model.image_tower.connector.positions.num_embeddings == 5


def test_boxes_mean_shares_of_what_the_overview_shows(tmp_path):
    parts = save_tiny_parts(tmp_path)
    geometries = {name: assemble(**_with(parts, tiles=name))[1].image_geometry for name in TILES}
    assert geometries == {"llava_next": "squash", "internvl": "squash", "sphinx": "pad"}


def test_tiles_are_no_llava(tmp_path):
    model, processor = tiny_model(tmp_path, image={"tiles": "llava_next"})
    with pytest.raises(ExportError, match="it reads images in tiles"):
        find_target(model, processor)


@pytest.mark.parametrize("name", TILES)
def test_saved_and_loaded_with_its_processor(tmp_path, name):
    """Also by stock `__call__`, which writes the placeholders itself."""
    model, processor = tiny_model(tmp_path, image={"tiles": name})
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["image_config"]["rule"]["tiles"]["grids"]
    loaded, again = load_model(tmp_path / "saved"), AutoProcessor.from_pretrained(tmp_path / "saved")
    assert again.rule("image") == processor.rule("image") == loaded.config.image_config.media_rule
    pictures = [Image.new("RGB", (40, 15), "red"), Image.new("RGB", (17, 20), "blue")]
    inputs = again(text=["a <image> and", "<image>"], images=pictures, padding=True, return_tensors="pt")
    media = processor.encode_media([MediaInput("image", one, (one.height, one.width)) for one in pictures])
    assert {key: value.tolist() for key, value in media.items()} == {key: inputs[key].tolist() for key in media}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def _with(parts: dict, **image) -> dict:
    return {**parts, "image": {**parts["image"], **image}}
