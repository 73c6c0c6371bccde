"""Several encoders as one: each sees what it would see alone, and what they see is joined as stated."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from mllm.assemble import assemble
from mllm.models import MixedEncoder
from mllm.models.encoders import load_encoder, unused_parameters
from mllm.models.grids import align_grid, grid_of_tokens
from mllm.models.mixed_encoder import own_pixels
from mllm.models.parts import PartOptions, apply_modes, parts_of
from mllm.models.query_encoder import load_query_encoder
from mllm.models.streams import join_streams, split_streams
from mllm.processing.build import load_image_processor
from mllm.processing.geometry import llava_image_processor
from mllm.sizes import num_tokens
from mllm.testing import save_tiny_parts
from mllm.testing_images import NUM_QUERIES, save_sphinx_encoders, save_tiny_image_encoder, tiny_image_model


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> str:
    return save_tiny_parts(tmp_path_factory.mktemp("parts"))["language_model"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
    """CLIP and DINOv2 have other colours, DINOv2 and ConvNeXt other sizes, SigLIP no class token."""
    root = tmp_path_factory.mktemp("encoders")
    sizes = {"clip_vision_model": 16, "dinov2_with_registers": 24, "siglip_vision_model": 16, "convnextv2": 32}
    return {name: save_tiny_image_encoder(root / name, name, image_size=size) for name, size in sizes.items()}


@pytest.fixture(scope="module")
def sphinx(tmp_path_factory, llm):
    encoders = save_sphinx_encoders(tmp_path_factory.mktemp("sphinx"))
    image = {"encoder": encoders, "join": "sequence", "connector": "streams", "feature_select": "full"}
    return assemble(language_model=llm, image={**image, "feature_layer": -1}), encoders


def _mixed(llm: str, encoders: list, **image):
    return assemble(language_model=llm, image={"encoder": encoders, **image})


def _picture(side: int, seed: int = 0) -> Image.Image:
    """Smooth, so that no filter overshoots what 8 bits can hold."""
    small = np.random.default_rng(seed).integers(60, 200, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def _hidden(path: str, pixels: torch.Tensor, layer: int = -2) -> tuple[torch.Tensor, int]:
    encoder, num_prefix_tokens = load_encoder(path, feature_layer=layer)
    with torch.no_grad():
        return encoder.eval()(pixels, output_hidden_states=True).hidden_states[-1], num_prefix_tokens


def test_each_encoder_sees_what_it_would_see_alone(llm, paths):
    """In its own size and colours, up to the 8 bits that an image processor rounds to in between."""
    model, processor = _mixed(llm, list(paths.values()))
    config = model.config.image_config
    largest = config.media_rule.image_size
    assert largest == 32
    picture = _picture(largest)
    pixels = processor.encode_images([picture])
    for path, reading in zip(paths.values(), config.encoder_config.readings, strict=True):
        own = load_image_processor(path)
        alone = llava_image_processor(own, image_size=reading["image_size"], geometry="pad")
        expected = alone([picture], return_tensors="pt")["pixel_values"].float()
        found = own_pixels(pixels, reading)
        assert found.shape == expected.shape
        bound = 1e-5 if reading["image_size"] == largest else 1.01 / 255 / min(own.image_std)
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_the_first_encoder_gets_its_pixels_bit_for_bit(llm, paths):
    encoders = [paths["dinov2_with_registers"], paths["clip_vision_model"]]
    reading = _mixed(llm, encoders)[0].config.image_config.encoder_config.readings[0]
    pixels = torch.randn(2, 3, 24, 24)
    assert torch.equal(own_pixels(pixels, reading), pixels)


def test_channels_of_aligned_grids(llm, paths):
    """CLIP's 2 x 2, the 3 x 3 of DINOv2 behind 5 tokens in front, SigLIP's 2 x 2: all as 3 x 3, channels in order."""
    names = ["clip_vision_model", "dinov2_with_registers", "siglip_vision_model"]
    model, processor = _mixed(llm, [paths[name] for name in names])
    config = model.config.image_config
    assert config.feature_sizes == [96] and not config.feature_lengths
    pixels = processor.encode_images([_picture(24), _picture(30, seed=1)])
    found = model.model.image_tower.encode(pixels)
    grids = []
    for name, reading in zip(names, config.encoder_config.readings, strict=True):
        hidden, num_prefix_tokens = _hidden(paths[name], own_pixels(pixels, reading))
        grids.append(align_grid(grid_of_tokens(hidden, num_prefix_tokens), 3))
    for cell in range(9):
        expected = torch.cat([grid[:, :, cell // 3, cell % 3] for grid in grids], dim=-1)
        torch.testing.assert_close(found[:, cell], expected)
    assert config.media_rule.views((30, 30)) == (9,)


def test_a_class_token_in_front_of_each_grid(llm, paths):
    """The encoder's own, without registers; SigLIP, which has none, gives the mean of its grid."""
    names = ["dinov2_with_registers", "siglip_vision_model"]
    model, processor = _mixed(llm, [paths[name] for name in names], feature_select="full")
    pixels = processor.encode_images([_picture(24)])
    found = model.model.image_tower.encode(pixels)
    readings = model.config.image_config.encoder_config.readings
    seen = [_hidden(paths[name], own_pixels(pixels, one))[0] for name, one in zip(names, readings, strict=True)]
    torch.testing.assert_close(found[:, 0], torch.cat([seen[0][:, 0], seen[1].mean(1)], dim=-1))
    assert found.shape[1] == 10 == model.config.image_config.media_rule.views((24, 24))[0]


def test_streams_follow_one_another(llm, paths):
    """Linear and LayerNorm for each, by the formula, in float64."""
    names = ["clip_vision_model", "dinov2_with_registers"]
    model, processor = _mixed(llm, [paths[name] for name in names], join="sequence", connector="streams")
    config = model.config.image_config
    assert (config.feature_sizes, config.feature_lengths) == ([32, 32], [4, 9])
    pixels = processor.encode_images([_picture(24)])
    found = model.model.get_image_features(pixels).pooler_output
    connector = model.model.image_tower.connector.double()
    expected = []
    for name, reading, layer in zip(names, config.encoder_config.readings, connector.projections, strict=True):
        hidden, num_prefix_tokens = _hidden(paths[name], own_pixels(pixels, reading))
        projected = hidden[:, num_prefix_tokens:].double() @ layer[0].weight.T + layer[0].bias
        centred = projected - projected.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + layer[1].eps).sqrt()
        expected.append(normed * layer[1].weight + layer[1].bias)
    torch.testing.assert_close(found.double(), torch.cat(expected, dim=1), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_q_former_reads_both_streams(llm, paths):
    """Each with queries of its own; what either encoder sees changes what all of them become."""
    qformer = {"type": "multi_stream_qformer", "num_queries": 4, "num_local_queries": 3, "layers": 2}
    small = {"hidden_size": 16, "heads": 2, "intermediate_size": 20}
    encoders = [paths["clip_vision_model"], paths["dinov2_with_registers"]]
    model, processor = _mixed(llm, encoders, join="sequence", connector={**qformer, **small})
    pixels = processor.encode_images([_picture(24)])
    assert num_tokens((24, 24), model.config.image_config.media_rule) == 7
    tower = model.model.image_tower
    seen = tower.encode(pixels)
    before = tower.connect(seen)
    assert before.shape == (1, 7, 32)
    for number, stream in enumerate(split_streams(seen, lengths=(4, 9), widths=(32, 32))):
        changed = seen.clone()
        changed[:, (0, 4)[number] : (4, 13)[number]] = stream.flip(-1)
        assert not torch.isclose(tower.connect(changed), before).all(-1).any()


def test_streams_come_apart_as_they_were():
    streams = tuple(torch.randn(2, length, width) for length, width in ((3, 5), (1, 2), (4, 7)))
    joined = join_streams(streams)
    assert joined.shape == (2, 8, 7)
    parts = split_streams(joined, lengths=(3, 1, 4), widths=(5, 2, 7))
    assert all(torch.equal(part, stream) for part, stream in zip(parts, streams, strict=True))


@torch.no_grad()
def test_the_layout_of_sphinx(sphinx):
    """32 queries, then 257 tokens of three encoders (arXiv 2311.07575); here 5, then 1 + 4 x 4."""
    (model, processor), encoders = sphinx
    queries, (clip, convnext, dino) = encoders[0]["encoder"], encoders[1]
    config = model.config.image_config
    assert config.feature_sizes == [32, 32 + 20 + 32]
    assert config.feature_lengths == [NUM_QUERIES, 17]
    pixels = processor.encode_images([_picture(32)])
    readings = config.encoder_config.readings
    own = [own_pixels(pixels, reading) for reading in readings]
    read = load_query_encoder(queries).eval()(own[0]).last_hidden_state
    clip_tokens, dino_tokens = _hidden(clip, own[1], -1)[0], _hidden(dino, own[3], -1)[0]
    stages = AutoModel.from_pretrained(convnext["encoder"]).eval()(own[2], output_hidden_states=True).hidden_states[-1]
    cells = stages.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2).transpose(1, 2)
    tokens = [
        torch.cat([clip_tokens[:, :1], _doubled(clip_tokens[:, 1:])], 1),
        torch.cat([stages.mean((2, 3))[:, None], cells], 1),
        dino_tokens,
    ]
    first, second = model.model.image_tower.connector.projections
    expected = torch.cat([first(read), second(torch.cat(tokens, dim=-1))], dim=1)
    torch.testing.assert_close(model.model.get_image_features(pixels).pooler_output, expected)


def _doubled(cells: torch.Tensor) -> torch.Tensor:
    return torch.cat([cells[:, [row // 2 * 2 + column // 2]] for row in range(4) for column in range(4)], dim=1)


@torch.no_grad()
def test_saved_equals_reloaded(sphinx, tmp_path):
    (model, processor), _ = sphinx
    pixels = processor.encode_images([_picture(32)])
    expected = model.model.get_image_features(pixels).pooler_output
    model.save_pretrained(tmp_path / "model")
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(again.model.get_image_features(pixels).pooler_output, expected)
    encoder = model.model.image_tower.encoder
    encoder.save_pretrained(tmp_path / "encoder")
    alone = AutoModel.from_pretrained(tmp_path / "encoder")
    assert isinstance(alone, MixedEncoder)
    assert torch.equal(alone(pixels).last_hidden_state, encoder(pixels).last_hidden_state)
    assert AutoConfig.from_pretrained(tmp_path / "encoder").to_dict() == alone.config.to_dict()


def test_the_attention_choice_reaches_every_encoder(sphinx, tmp_path):
    sphinx[0][0].save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager")
    encoder = model.model.image_tower.encoder
    configs = [encoder.first.vision_model.config, encoder.first.qformer.config, encoder.second.config]
    assert {config._attn_implementation for config in (*configs, encoder.fourth.config)} == {"eager"}
    inner = {name for one in encoder.encoders.values() for name in one._no_split_modules}
    assert inner and inner <= set(model._no_split_modules)


def test_what_gets_no_gradient_is_what_the_table_names(sphinx):
    (model, processor), _ = sphinx
    encoder = model.model.image_tower.encoder
    encoder(processor.encode_images([_picture(32)])).last_hidden_state.square().sum().backward()
    without = {name for name, value in encoder.named_parameters() if value.grad is None}
    encoder.zero_grad()
    unused = unused_parameters(encoder.config)
    assert without == {name for name, _ in encoder.named_parameters() if name.startswith(unused)} != set()


def test_it_is_one_part_and_stays_in_eval_mode_while_frozen(llm, paths):
    model, _ = _mixed(llm, [paths["clip_vision_model"], paths["convnextv2"]])
    encoder = model.model.image_tower.encoder
    modes = {"image.encoder": PartOptions("frozen"), "image.connector": PartOptions("full")}
    apply_modes(model, modes)
    assert parts_of(model).keys() == {"image.encoder", "image.connector", "text"}
    model.train()
    assert not any(module.training for module in encoder.modules())
    apply_modes(model, {"image.encoder": PartOptions("full")})
    assert {name.split(".")[0] for name, value in encoder.named_parameters() if value.requires_grad} == {
        "first",
        "second",
    }


@torch.no_grad()
@pytest.mark.parametrize("family", ["convnext", "convnextv2"])
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_a_convolutional_encoder_gives_its_stage(llm, tmp_path, family, layer):
    """Alone, too: its cells are features as patches are."""
    path = save_tiny_image_encoder(tmp_path / family, family, image_size=24)
    model, processor = assemble(language_model=llm, image={"encoder": path, "feature_layer": layer})
    pixels = processor.encode_images([_picture(24)])
    whole = AutoModel.from_pretrained(path).eval()
    expected = whole(pixels, output_hidden_states=True).hidden_states[layer].flatten(2).transpose(1, 2)
    found = model.model.image_tower.encode(pixels)
    assert torch.equal(found, expected)
    assert model.config.image_config.media_rule.views((24, 24)) == (found.shape[1],)
    assert model.config.image_config.feature_sizes == [found.shape[2]]
    stages = {name for name in model.state_dict() if ".stages." in name}
    assert len({name.split(".stages.")[1].split(".")[0] for name in stages}) == (layer % 4 if layer < 0 else layer)


@torch.no_grad()
def test_a_convolutional_encoder_can_see_another_size(llm, paths, tmp_path):
    entry = {"encoder": paths["convnextv2"], "image_size": 48, "feature_layer": -1}
    model, processor = _mixed(llm, [paths["clip_vision_model"], entry])
    assert model.config.image_config.media_rule.views((9, 9)) == (36,)
    assert processor.encode_images([_picture(20)]).shape[-1] == 48
    features = model.model.image_tower.encode(processor.encode_images([_picture(48)]))
    assert features.shape == (1, 36, 32 + 20)


@torch.no_grad()
@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers", "dinov3_vit"])
def test_dino_can_see_another_size(llm, tmp_path, family):
    """The published DINOv2 are configured for 518 pixels, and SPHINX shows 224 to one of them."""
    path = save_tiny_image_encoder(tmp_path / family, family, image_size=32)
    model, processor = assemble(language_model=llm, image={"encoder": path, "image_size": 24})
    pixels = processor.encode_images([_picture(24)])
    hidden, num_prefix_tokens = _hidden(path, pixels)
    assert torch.equal(model.model.image_tower.encode(pixels), hidden[:, 1:])
    mixed, _ = _mixed(llm, [{"encoder": path, "image_size": 24}])
    assert torch.equal(mixed.model.image_tower.encode(pixels), hidden[:, num_prefix_tokens:])
    counts = [one.config.image_config.media_rule.views((9, 9)) for one in (model, mixed)]
    assert counts == [(8 + num_prefix_tokens,), (9,)]


@torch.no_grad()
def test_the_size_that_all_see_can_be_stated(llm, paths):
    """SPHINX brings an image to 224 pixels, and then to 256 for its ConvNeXt."""
    encoders = [paths["clip_vision_model"], paths["convnextv2"]]
    model, processor = _mixed(llm, encoders, image_size=16)
    pixels = processor.encode_images([_picture(30)])
    assert pixels.shape[-1] == 16
    readings = model.config.image_config.encoder_config.readings
    assert [own_pixels(pixels, one).shape[-1] for one in readings] == [16, 32]
    assert torch.equal(own_pixels(pixels, readings[0]), pixels)
    assert model.model.image_tower.encode(pixels).shape[1:] == (64, 32 + 12)
    alone, processor = assemble(language_model=llm, image={"encoder": paths["convnextv2"], "image_size": 48})
    assert processor.encode_images([_picture(30)]).shape[-1] == 48
    assert alone.config.image_config.media_rule.views((9, 9)) == (144,)


@torch.no_grad()
@pytest.mark.parametrize("family", ["blip-2", "instructblip"])
def test_the_image_encoder_of_blip(tmp_path, family):
    whole = tiny_image_model(family)
    path = save_tiny_image_encoder(tmp_path, family)
    pixels = torch.randn(2, 3, 16, 16)
    for layer in (-1, -2, 1):
        expected = whole.vision_model(pixels, output_hidden_states=True).hidden_states[layer]
        assert torch.equal(_hidden(path, pixels, layer)[0], expected)


@torch.no_grad()
def test_queries_are_those_of_blip_2(tmp_path):
    whole = tiny_image_model("blip-2")
    path = save_tiny_image_encoder(tmp_path / "blip", "blip-2")
    pixels = torch.randn(2, 3, 16, 16)
    found = load_query_encoder(path).eval()(pixels).last_hidden_state
    assert found.shape == (2, NUM_QUERIES, 32)
    seen = whole.vision_model(pixels).last_hidden_state
    read = whole.qformer(query_embeds=whole.query_tokens.expand(2, -1, -1), encoder_hidden_states=seen)
    torch.testing.assert_close(found, read.last_hidden_state)


@torch.no_grad()
def test_neighbours_change_nothing(sphinx):
    (model, processor), _ = sphinx
    pixels = processor.encode_images([_picture(20, seed) for seed in range(3)])
    together = model.model.get_image_features(pixels).pooler_output
    for number in range(3):
        alone = model.model.get_image_features(pixels[number : number + 1]).pooler_output
        torch.testing.assert_close(together[number], alone[0], rtol=1e-5, atol=1e-5)


def test_bf16_is_near(sphinx):
    (model, processor), _ = sphinx
    pixels = processor.encode_images([_picture(32)])
    with torch.no_grad():
        exact = model.model.get_image_features(pixels).pooler_output
        near = deepcopy(model).to(torch.bfloat16).model.get_image_features(pixels).pooler_output
    assert near.dtype == torch.bfloat16
    assert functional.cosine_similarity(exact.flatten(), near.float().flatten(), dim=0) > 0.995


@torch.no_grad()
@pytest.mark.parametrize("per", ["view", "item"])
def test_frames_of_a_video_go_the_same_way(llm, paths, per):
    """Of streams that are read per item, each is joined over the frames before the next one follows."""
    encoders = [paths["clip_vision_model"], paths["dinov2_with_registers"]]
    image = {"encoder": encoders, "join": "sequence", "connector": "streams"}
    video = {"connector": {"type": "streams", "per": per, "positions": 3}, "frames": "uniform:3"}
    model, processor = assemble(language_model=llm, image=image, video=video)
    assert model.config.video_config.feature_lengths == [4, 9]
    frames = processor.encode_images([_picture(24, seed) for seed in range(5)])
    found = model.model.get_video_features(frames, torch.tensor([3, 2])).pooler_output
    connector = model.model.video_tower.connector
    streams = split_streams(model.model.image_tower.encode(frames), lengths=(4, 9), widths=(32, 32))
    assert connector.positions is not None
    places = connector.positions(torch.tensor([0, 1, 2, 0, 1]))[:, None].split(32, dim=-1)
    first, second = (
        layer(one + place) for layer, one, place in zip(connector.projections, streams, places, strict=True)
    )
    for vectors, own in zip(found, (slice(0, 3), slice(3, 5)), strict=True):
        if per == "view":
            expected = torch.cat([first[own], second[own]], dim=1).flatten(0, 1)
        else:
            expected = torch.cat([first[own].flatten(0, 1), second[own].flatten(0, 1)])
        torch.testing.assert_close(vectors, expected)
    size = (24, 24, 30, 3.0)
    assert num_tokens(size, model.config.video_config.media_rule) == 3 * 13 == len(found[0])
