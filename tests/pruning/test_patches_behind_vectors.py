"""The evidence of a vector is that of its patches: change a patch, and it changes for the same vectors.

Attention in the encoder is switched off, so that a patch reaches the vectors that are made of it, and no other. Which
these are the model itself says, without a pruner.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mllm.errors import OptionError
from mllm.models.media import Media
from mllm.models.parts import PartOptions, apply_modes
from mllm.pruning import DivPrune, Pruner, VisionZip
from mllm.pruning.patches import connected_patches, resized_places
from mllm.sizes import LengthRule
from mllm.testing import tiny_model
from mllm.testing_images import save_sphinx_encoders, save_tiny_image_encoder
from mllm.testing_visual import VISUAL_BATCHES, composed_visual_batch, visual_batch

ENCODERS = ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", "vit")
QFORMER = {
    "type": "qformer", "num_queries": 3, "layers": 2, "hidden_size": 16, "heads": 2, "intermediate_size": 32,
    "cross_attention_frequency": 1, "dropout": 0.0,
}  # fmt: skip
POOL = {"type": "pool", "over": "grid", "size": 2}
COMPOSED: dict[str, Any] = {
    "mlp": {},
    "linear, all tokens": {"image": {"connector": "linear", "feature_select": "full"}},
    "pixel shuffle": {"image": {"connector": {"type": "patch_merge", "size": 2}}},
    "pool, in part": {"image": {"connector": {**POOL, "size": 3}}},
    "pool, in a row": {"image": {"connector": {"type": "pool", "size": 3}}},
    "stacked": {"image": {"connector": {"type": "frame_stack", "size": 3}}},
    "tiles, llava_next": {"image": {"tiles": "llava_next"}},
    "tiles, internvl": {"image": {"tiles": {"type": "internvl", "max_tiles": 4}, "connector": "patch_merge"}},
    "tiles, sphinx": {"image": {"tiles": "sphinx"}},
    "tiles, one sequence": {"image": {"tiles": "sphinx", "connector": {"type": "pool", "size": 3, "per": "item"}}},
}
# Every connector with one encoder, every encoder with one connector.
BESIDE = [*((encoder, "mlp") for encoder in ENCODERS[1:]), ("dinov2_with_registers", "linear, all tokens")]
VIDEOS: dict[str, Any] = {
    "mlp": {"video": {"connector": "mlp"}},
    "pool": {"video": {"connector": POOL}},
    "through the images'": {
        "image": {"connector": "patch_merge"},
        "video": {"connector": {"type": "pool", "size": 3, "per": "item"}, "through_image_connector": True},
    },
}
MIXING = {
    "qformer": {"image": {"connector": QFORMER}},
    "perceiver": {"image": {"connector": {"type": "perceiver", "num_latents": 3, "depth": 1}}},
    "video qformer": {"video": {"connector": {**QFORMER, "per": "item", "positions": 8}}},
}


@dataclass
class Looking(Pruner):
    """Keeps all, and notes the items."""

    seen: list = field(default_factory=list)

    encoder_layers = (0, -1)

    def select(self, item, num_layers):
        self.seen.append(item)


@pytest.mark.parametrize("name", [name for name in VISUAL_BATCHES if "pixtral" not in name])
def test_stock_models(name):
    batch = visual_batch(name)
    without_attention(batch.model)
    for modality, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if key in batch.inputs:
            check(batch.model, key, lambda inputs, modality=modality: encode(batch, modality, inputs), batch.inputs)


@pytest.mark.parametrize(("encoder", "name"), [*((ENCODERS[0], name) for name in COMPOSED), *BESIDE])
def test_composed_models(tmp_path, encoder, name):
    options = {"feature_select": "patches"} if encoder == "dinov2_with_registers" else {}
    image = {**options, **COMPOSED[name].get("image", {})}
    model = composed(tmp_path, encoder, image=image)
    sizes = torch.tensor([[20, 30], [16, 16], [40, 10]])
    rule = model.model.image_tower.rule
    num_views = sum(len(rule.views(tuple(size))) for size in sizes.tolist())
    inputs = {"pixel_values": torch.randn(num_views, 3, 32, 32), "image_sizes": sizes}
    check(model, "pixel_values", lambda given: model.get_image_features(**given).pooler_output, inputs)


@pytest.mark.parametrize("name", VIDEOS)
def test_composed_models_and_videos(tmp_path, name):
    model = composed(tmp_path, "clip_vision_model", **VIDEOS[name])
    inputs = {"pixel_values_videos": torch.randn(5, 3, 32, 32), "video_sizes": torch.tensor([2, 3])}
    check(model, "pixel_values_videos", lambda given: model.get_video_features(**given).pooler_output, inputs)


@pytest.mark.parametrize("parts", MIXING.values(), ids=MIXING)
def test_where_all_patches_are_mixed_there_is_none(tmp_path, parts):
    model = composed(tmp_path, "clip_vision_model", **parts)
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    if "video" in parts:
        inputs = {"pixel_values_videos": torch.randn(5, 3, 32, 32), "video_sizes": torch.tensor([2, 3])}
    see = model.get_video_features if "video" in parts else model.get_image_features
    pruner = Looking()
    with pruner(model):
        see(**inputs)
    assert [item.evidence for item in pruner.seen] == [None, None]
    with VisionZip(tokens=1)(model), pytest.raises(OptionError, match="VisionZip.*its connector mixes all patches"):
        see(**inputs)


@pytest.mark.parametrize("layer", [2, -3])
def test_layers_that_the_encoder_lacks_are_refused(layer):
    """Of three, the last of which LLaVA does not use."""
    pruner = type("LookingElsewhere", (Looking,), {"encoder_layers": (layer,)})()
    model = visual_batch("llava").model
    with pytest.raises(OptionError, match=f"layer {layer} of an encoder, of which 2"), pruner(model):
        pass
    assert not model.model.vision_tower.encoder.layers[0]._forward_pre_hooks


@torch.no_grad()
def test_encoders_that_tell_nothing_say_why(tmp_path):
    several = {"encoder": save_sphinx_encoders(tmp_path), "join": "sequence", "connector": "streams"}
    reasons = {
        "its features are those of several encoders": composed_visual_batch(tmp_path / "parts", image=several),
        "its encoder is a pixtral": visual_batch("llava, pixtral"),
    }
    for reason, batch in reasons.items():
        with VisionZip(tokens=1)(batch.model), pytest.raises(OptionError, match=f"VisionZip.*{reason}"):
            batch.model(**batch.inputs)
        with DivPrune(tokens=1)(batch.model) as pruner:
            batch.model(**batch.inputs)
        assert all(len(item.kept[0]) == 1 for row in pruner.statistics.items for item in row)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava_next", "internvl", "smolvlm", "qwen2_5_vl"])
def test_fresh_adapters_change_nothing(name):
    """Nor does a connector of which a copy is trained."""
    batch = visual_batch(name)
    with VisionZip(tokens=3)(batch.model):
        expected = batch.model(**batch.inputs).logits
    modes = {"image.encoder": "lora", "image.connector": "full", "text": "lora"}
    adapted = apply_modes(batch.model, {part: PartOptions(mode) for part, mode in modes.items()}).eval()
    with VisionZip(tokens=3)(adapted) as pruner:
        found = adapted(**batch.inputs).logits
    assert torch.equal(found, expected)
    assert all(len(item.kept[0]) == 3 for row in pruner.statistics.items for item in row)


def test_images_and_frames_share_one_call(tmp_path):
    """Of a batch of both, each item gets its own."""
    model = composed(tmp_path, "clip_vision_model", video={"connector": "mlp"})
    frames, images = torch.randn(3, 3, 32, 32), torch.randn(2, 3, 32, 32)
    media = [Media("image", images), Media("video", frames, torch.tensor([1, 2]))]
    together, alone = Looking(), Looking()
    with torch.no_grad(), together(model):
        model.model.encode_media(media)
    with torch.no_grad(), alone(model):
        for one in media:
            model.model.encode_media([one])
            # A new batch begins with a forward or with `generate`.
            model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1, do_sample=False)
    for one, other in zip(together.seen, alone.seen, strict=True):
        torch.testing.assert_close(one.evidence.mean_keys(0), other.evidence.mean_keys(0))


def test_connected_patches_by_hand():
    """A grid of 3 x 3 in squares of 2 x 2, and five features in windows of two."""
    patches = torch.arange(9)[:, None] + 100
    squares = [[100, 101, 103, 104], [102, -1, 105, -1], [106, 107, -1, -1], [108, -1, -1, -1]]
    assert connected_patches(patches, LengthRule("grid", size=2)).tolist() == squares
    windows = connected_patches(patches[:5], LengthRule("windows", size=2))
    assert windows.tolist() == [[100, 101], [102, 103], [104, -1]]
    dropped = connected_patches(patches[:5], LengthRule("windows", size=2, rounds_up=False))
    assert dropped.tolist() == [[100, 101], [102, 103]]
    assert connected_patches(patches, LengthRule("fixed", tokens=3)) is None


@pytest.mark.parametrize(("size", "to"), [((4, 4), (2, 2)), ((3, 5), (2, 3)), ((7, 6), (5, 4)), ((2, 2), (2, 2))])
def test_resized_cells_are_those_that_are_interpolated(size, to):
    places = resized_places(*size, to=to)
    for cell in range(size[0] * size[1]):
        values = torch.zeros(size[0] * size[1], dtype=torch.float64)
        values[cell] = 1
        resized = torch.nn.functional.interpolate(values.view(1, 1, *size), to, mode="bilinear").flatten()
        assert (resized > 1e-9).tolist() == (places == cell).any(dim=1).tolist()


def check(model, key, see, inputs):
    """Changed patches change vectors, and the evidence of the same."""
    before = looked(model, see, inputs)
    assert all(item.evidence is not None for item in before)
    num_changed = 0
    for values in changed(inputs[key]):
        after = looked(model, see, {**inputs, key: values})
        for one, other in zip(before, after, strict=True):
            expected = differs(one.vectors, other.vectors)
            # Keys of the first layer: no layer has mixed anything yet.
            keys = [item.evidence.of_vectors(item.evidence.mean_keys(0)) for item in (one, other)]
            assert differs(*keys) == expected
            num_changed += len(expected)
    assert num_changed >= len(before)


def changed(pixels):
    """The pixels with one patch that is another, for some patches of each view that is there."""
    if pixels.dim() == 2:  # a row for each patch
        for number in range(0, len(pixels), 5):
            yield pixels.index_add(0, torch.tensor([number]), torch.ones(1, pixels.shape[1]))
        return
    for view, own in enumerate(pixels.flatten(0, -4)):
        for row, column in [((8, 0), (own.shape[-1] - 8, 8))[view % 2]] if own.any() else ():
            values = pixels.clone()
            values.flatten(0, -4)[view, :, row : row + 4, column : column + 4] += 1
            yield values


def looked(model, see, inputs):
    pruner = Looking()
    with torch.no_grad(), pruner(model):
        see(inputs)
        assert pruner.seen
    return pruner.seen


def differs(one, other):
    return ((one - other).abs().amax(dim=-1) > 1e-6).nonzero()[:, 0].tolist()


def encode(batch, modality, inputs):
    """Encode the pictures, or the videos, of a batch."""
    names = {
        "image": ("pixel_values", "image_sizes", "batch_num_images", "image_grid_thw"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }
    given = {name: inputs[name] for name in names[modality] if name in inputs}
    return getattr(batch.model.model, f"get_{modality}_features")(**given, return_dict=True)


def composed(tmp_path, encoder, **parts):
    """A composed model whose encoder sees 4 x 4 patches, and attends to nothing."""
    own = save_tiny_image_encoder(tmp_path / "eyes", encoder, image_size=32)
    parts["image"] = {**parts.get("image", {}), "encoder": own}
    model = tiny_model(tmp_path, **parts)[0]
    without_attention(model)
    return model


def without_attention(model):
    """Let nothing come out of an encoder's attention."""
    names = ("out_proj", "o_proj", "projection_layer", "attn.proj")
    for name, module in model.named_modules():
        if name.endswith(names) and any(part in name for part in ("vision", "visual", "encoder")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
