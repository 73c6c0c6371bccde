"""Several image encoders: what is refused, and that the message says what can be done."""

import pytest
import yaml

from mllm.assemble import assemble
from mllm.errors import CompositionError, OptionError
from mllm.models.parts import PartOptions, apply_modes
from mllm.testing import save_tiny_parts
from mllm.testing_images import save_tiny_image_encoder
from mllm.training.plan import read_plan


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("bad")
    paths = {name: save_tiny_image_encoder(root / name, name) for name in ("clip_vision_model", "vit", "blip-2")}
    return {"language_model": save_tiny_parts(root / "parts")["language_model"], **paths}


def _assemble(parts: dict, **image):
    assemble(language_model=parts["language_model"], image=image)


def test_too_many_or_none(parts):
    with pytest.raises(OptionError, match="5 encoders"):
        _assemble(parts, encoder=[parts["vit"]] * 5)
    with pytest.raises(OptionError, match="0 encoders"):
        _assemble(parts, encoder=[])


def test_an_entry_that_is_none(parts):
    for entry in (3, {"path": parts["vit"]}, {"encoder": parts["vit"], "size": 3}):
        with pytest.raises(OptionError, match="among several encoders"):
            _assemble(parts, encoder=[parts["vit"], entry])


def test_an_unknown_join(parts):
    with pytest.raises(OptionError, match="one of channels, sequence"):
        _assemble(parts, encoder=[parts["vit"]] * 2, join="sum")
    with pytest.raises(OptionError, match="join: sequence"):
        _assemble(parts, encoder=[[parts["vit"], parts["vit"]], parts["vit"]], join="channels")


def test_queries_have_no_cells(parts):
    entry = {"encoder": parts["blip-2"], "queries": True}
    with pytest.raises(CompositionError, match="no grid, joined by channels"):
        _assemble(parts, encoder=[entry, parts["vit"]])
    with pytest.raises(OptionError, match="neither"):
        _assemble(parts, encoder=[entry | {"feature_layer": -1}])
    with pytest.raises(CompositionError, match="a BLIP-2 checkpoint"):
        _assemble(parts, encoder=[{"encoder": parts["vit"], "queries": True}])


def test_a_connector_that_reads_one_stream(parts):
    with pytest.raises(OptionError, match="`streams` or `multi_stream_qformer`"):
        _assemble(parts, encoder=[parts["vit"]] * 2, join="sequence", connector="mlp")


def test_a_size_that_positions_are_not_made_for(parts):
    entry = {"encoder": parts["vit"], "image_size": 32}
    with pytest.raises(CompositionError, match="made for 16 pixels"):
        _assemble(parts, encoder=[parts["clip_vision_model"], entry])
    with pytest.raises(CompositionError, match="made for 16 pixels"):
        _assemble(parts, encoder=parts["vit"], image_size=32)


def test_a_size_of_which_no_cell_is_left(parts, tmp_path):
    path = save_tiny_image_encoder(tmp_path / "convnext", "convnext")
    with pytest.raises(CompositionError, match="not one cell"):
        _assemble(parts, encoder=[{"encoder": path, "image_size": 4, "feature_layer": -1}])


def test_streams_are_no_map_of_tiles(parts):
    image = {"encoder": [parts["vit"]] * 2, "join": "sequence", "connector": "streams"}
    with pytest.raises(CompositionError, match="read as one map"):
        _assemble(parts, **image, tiles="llava_next")


def test_layers_of_which_encoder(parts):
    model, _ = assemble(
        language_model=parts["language_model"], image={"encoder": [parts["vit"], parts["clip_vision_model"]]}
    )
    with pytest.raises(OptionError, match="several encoders"):
        apply_modes(model, {"image.encoder": PartOptions("full", layers="1:")})


def test_a_plan_names_the_directory_that_is_not_there(parts, tmp_path):
    plan = tmp_path / "plan.yaml"
    model = {"language_model": parts["language_model"], "image": {"encoder": [parts["vit"], "./nowhere"]}}
    plan.write_text(yaml.safe_dump({"model": model, "stages": [{"name": "one", "data": ["x"]}]}))
    with pytest.raises(OptionError, match="image.encoder = './nowhere' is not there"):
        read_plan(plan, output_dir=tmp_path / "out")
