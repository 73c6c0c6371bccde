"""Under pytest mllm checks its annotations at each call: without this the shapes in signatures are only comments."""

import pytest
from jaxtyping import TypeCheckError

from mllm.sizes import ImageTokenRule, num_tokens

RULE = ImageTokenRule(image_size=336, patch_size=14, num_prefix_tokens=1, feature_select="default")


def test_a_right_call_passes():
    assert num_tokens((480, 640), RULE) == 576


def test_a_wrong_call_is_refused():
    with pytest.raises(TypeCheckError, match="size"):
        num_tokens(("480", 640), RULE)


def test_a_wrong_field_is_refused():
    with pytest.raises(TypeCheckError, match="patch_size"):
        ImageTokenRule(image_size=336, patch_size="14", num_prefix_tokens=1, feature_select="default")
