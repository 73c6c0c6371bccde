"""Token counts by hand, and against what encoders really put out."""

import pytest

from mllm.models.encoders import ENCODERS
from mllm.sizes import ImageTokenRule, num_tokens
from mllm.testing import tiny_encoder


@pytest.mark.parametrize(
    ("rule", "tokens"),
    [
        (ImageTokenRule(image_size=336, patch_size=14, num_prefix_tokens=1, feature_select="default"), 576),
        (ImageTokenRule(image_size=336, patch_size=14, num_prefix_tokens=1, feature_select="full"), 577),
        (ImageTokenRule(image_size=384, patch_size=14, num_prefix_tokens=0, feature_select="full"), 729),
        (ImageTokenRule(image_size=224, patch_size=16, num_prefix_tokens=5, feature_select="default"), 200),
    ],
)
def test_counts_by_hand(rule, tokens):
    assert num_tokens((480, 640), rule) == tokens


@pytest.mark.parametrize("family", ["clip_vision_model", "siglip_vision_model", "dinov2_with_registers", "dinov3_vit"])
@pytest.mark.parametrize("feature_select", ["default", "full"])
def test_count_is_what_the_encoder_puts_out(family, feature_select):
    import torch

    encoder = tiny_encoder(family)
    hidden = encoder(torch.zeros(1, 3, 16, 16), output_hidden_states=True).hidden_states[-1]
    rule = ImageTokenRule(
        image_size=16,
        patch_size=8,
        num_prefix_tokens=ENCODERS[family].num_prefix_tokens(encoder.config),
        feature_select=feature_select,
    )
    dropped = feature_select == "default"
    assert num_tokens((16, 16), rule) == hidden.shape[1] - dropped
