"""What an image in tiles becomes is what stock models make of it with the same weights; what differs is worked out."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil

from mllm.assemble import assemble
from mllm.assemble.tiles import TILES, tile_rule
from mllm.export.mappings import TARGETS, rename_parameters
from mllm.models import MllmTowerConfig
from mllm.models.connectors import Layout, build_connector, num_parameters, written_connector
from mllm.models.connectors.arrangement import Arrangement
from mllm.processing.media import MediaInput
from mllm.sizes import ImageTokenRule, num_tokens, written_rule
from mllm.testing import save_tiny_parts, tiny_encoder

SIDE = 48
SIZES = [(60, 60), (59, 61), (30, 100), (90, 31), (5, 9), (1, 1), (1, 70), (200, 1), (13, 170), (333, 121)]


def _noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _parts(directory, encoder: str = "clip_vision_model", **image) -> dict:
    """Parts whose encoder has 6 x 6 patches, so that maps have something to be cut off."""
    parts = save_tiny_parts(directory, encoder=encoder, image=image)
    tiny_encoder(encoder, image_size=SIDE).save_pretrained(parts["image"]["encoder"])
    return parts


def _stock(model) -> LlavaNextForConditionalGeneration:
    """Stock LLaVA-NeXT with the weights of a composed model."""
    image = model.config.image_config
    rule = image.media_rule
    stock = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=image.encoder_config,
            text_config=model.config.text_config,
            image_token_index=image.placeholder_token_id,
            vision_feature_select_strategy=rule.feature_select,
            vision_feature_layer=image.feature_layer,
            image_grid_pinpoints=[[rows * SIDE, columns * SIDE] for rows, columns in rule.tiles.grids],
        )
    )
    newline = ("model.image_tower.connector.arrangement.newline", "model.image_newline")
    stock.load_state_dict(rename_parameters(model.state_dict(), (newline, *TARGETS["llava"].renames)), strict=True)
    return stock.eval()


@pytest.mark.parametrize("encoder", ["clip_vision_model", "siglip_vision_model"])
@pytest.mark.parametrize("tiles", ["llava_next", {"type": "llava_next", "max_tiles": 6}], ids=["five grids", "budget"])
def test_logits_are_those_of_stock_llava_next(tmp_path, encoder, tiles):
    model, processor = assemble(**_parts(tmp_path, encoder, tiles=tiles))
    stock = _stock(model)
    grids = stock.config.image_grid_pinpoints
    pixels = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=grids
    )
    for size in SIZES:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
        ids = torch.tensor([processor.encode_chat([message], media_sizes=[size]).input_ids])
        ours = processor.encode_media([MediaInput("image", _noise(*size), size)])
        theirs = pixels([_noise(*size)], return_tensors="pt")
        with torch.no_grad():
            found = model(input_ids=ids, **ours).logits
            expected = stock(input_ids=ids, **theirs).logits
        assert torch.equal(found, expected), size


def test_a_batch_is_packed_as_stock_llava_next_packs_it(tmp_path):
    model, processor = assemble(**_parts(tmp_path, tiles="llava_next"))
    stock = _stock(model)
    ours = processor.encode_media([MediaInput("image", _noise(*size), size) for size in SIZES])
    found = model.get_image_features(**ours).pooler_output
    views = ours["pixel_values"].split([len(processor.rule("image").views(size)) for size in SIZES])
    padded = torch.nn.utils.rnn.pad_sequence(list(views), batch_first=True)
    expected = stock.model.get_image_features(padded, ours["image_sizes"]).pooler_output
    assert len(found) == len(expected) == len(SIZES)
    for one, other, size in zip(found, expected, SIZES, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=f"{size}")
        assert len(one) == num_tokens(size, processor.rule("image"))


@pytest.mark.parametrize("overview", ["first", "last", "none"])
@pytest.mark.parametrize("separators", ["newline", "none"])
@pytest.mark.parametrize("size", [(60, 60), (30, 100), (90, 31), (13, 170), (1, 70)])
def test_a_map_is_read_line_by_line(overview, separators, size):
    """Every cell of a map knows its place; the overview's are told by negative numbers."""
    fit = "squash" if overview == "none" else "pad"
    tiles = tile_rule({"type": "llava_next", "overview": overview, "separators": separators, "fit": fit})
    rule = _rule(tiles)
    rows, columns = tiles.grid(size, SIDE)
    canvas = torch.stack(
        torch.meshgrid(torch.arange(1.0, 1 + 6 * rows), torch.arange(1.0, 1 + 6 * columns), indexing="ij"), dim=-1
    )
    cut = [canvas[6 * row : 6 * row + 6, 6 * column : 6 * column + 6].reshape(36, 2)
           for row in range(rows) for column in range(columns)]  # fmt: skip
    whole = -torch.ones(36, 2)
    arrangement = Arrangement(rule, out_size=2)
    found = arrangement([tiles.joined(whole, cut)], [size])
    # A cell shows the image where its middle lies within; but for rounding, as the images here have it.
    top, left = tiles.margins(size, (6 * rows, 6 * columns))
    expected = []
    for line in canvas[top : len(canvas) - top]:
        expected += [line[left : len(line) - left]]
        expected += [arrangement.newline[None]] if separators == "newline" else []
    before, behind = [whole] * (overview == "first"), [whole] * (overview == "last")
    assert torch.equal(found, torch.cat([*before, *expected, *behind]))
    assert len(found) == num_tokens(size, rule)


def test_margins_are_what_was_filled_up():
    """The share of lines or cells that are left out, against the share of the canvas that the image leaves free."""
    tiles = TILES["llava_next"]
    for height, width in np.random.default_rng(0).integers(20, 2000, (200, 2)).tolist():
        rows, columns = tiles.grid((height, width), SIDE)
        lines, cells = 100 * rows, 100 * columns
        scale = min(lines / height, cells / width)
        top, left = tiles.margins((height, width), (lines, cells))
        assert abs(top - (lines - height * scale) / 2) <= 1
        assert abs(left - (cells - width * scale) / 2) <= 1


def test_each_view_stands_between_its_ends():
    rule = _rule(TILES["sphinx"])
    arrangement = Arrangement(rule, out_size=3)
    views = list(torch.randn(5, 4, 3))
    found = arrangement([views], [(30, 40)])
    start, end = arrangement.start[None], arrangement.end[None]
    assert torch.equal(found, torch.cat([part for view in views for part in (start, view, end)]))


def test_views_without_separators_follow_one_another():
    views = list(torch.randn(7, 4, 3))
    found = Arrangement(_rule(TILES["internvl"]), out_size=3)([views], [(30, 40)])
    assert torch.equal(found, torch.cat(views))


@pytest.mark.parametrize(("name", "per"), [("llava_next", "view"), ("sphinx", "view"), ("sphinx", "item")])
def test_learned_vectors_get_gradients_with_and_without_images(name, per):
    """Without images a rank connects zeros, and every parameter waits for a gradient, of zeros."""
    config = _config(TILES[name], {"type": "mlp", "per": per})
    connector = build_connector(config)
    views = config.media_rule.views((1, 200))  # so thin that no line of a map is left of it
    for layout in (None, Layout([views], [(1, 200)]), Layout([config.media_rule.views((60, 60))], [(60, 60)])):
        connector.zero_grad()
        num_views = 1 if layout is None else len(layout.views[0])
        connected = connector(torch.randn(num_views, 36, 8), layout)
        total = sum(item.sum() for item in connected) * (0.0 if layout is None else 1.0)
        total.backward()
        assert [key for key, one in connector.named_parameters() if one.grad is None] == []
    assert all(vector.grad.abs().sum() > 0 for vector in connector.arrangement.parameters())


@pytest.mark.parametrize(("name", "vectors"), [("llava_next", 1), ("sphinx", 2), ("internvl", 0)])
def test_parameters_are_counted(name, vectors):
    plain = MllmTowerConfig(connector=written_connector("mlp"), feature_sizes=[8], text_hidden_size=5)
    assert num_parameters(_config(TILES[name], "mlp")) == num_parameters(plain) + 5 * vectors


@pytest.mark.parametrize("name", ["llava_next", "sphinx"])
def test_under_mixed_precision_all_vectors_have_its_type(name):
    config = _config(TILES[name], "mlp")
    connector = build_connector(config)
    views, size = config.media_rule.views((30, 100)), (30, 100)
    features = torch.randn(len(views), 36, 8)
    exact = connector(features, Layout([views], [size]))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        [half] = connector(features, Layout([views], [size]))
        alone = connector(features)
    assert half.dtype == alone.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=0.04 * float(exact.abs().max()))


def _rule(tiles, **fields) -> ImageTokenRule:
    return ImageTokenRule(SIDE, 8, 0, "full", tiles=tiles, **fields)


def _config(tiles, connector) -> MllmTowerConfig:
    choice = written_connector(connector)
    rule = written_rule(_rule(tiles, is_joined=choice["per"] == "item"))
    return MllmTowerConfig(connector=choice, feature_sizes=[8], text_hidden_size=5, rule=rule)
