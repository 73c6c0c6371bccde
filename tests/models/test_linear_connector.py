"""The linear connector, where it begins by changing nothing."""

import pytest
import torch

from mllm.errors import OptionError
from mllm.models.connectors import connector_options


def build(in_size, out_size, **options):
    kind, chosen = connector_options({"type": "linear", **options})
    return kind(chosen, in_sizes=(in_size,), out_size=out_size)


@pytest.mark.parametrize("bias", [True, False])
def test_it_starts_as_the_identity(bias):
    features = torch.randn(2, 3, 8)
    assert torch.equal(build(8, 8, starts_as_identity=True, bias=bias)(features), features)
    assert not torch.equal(build(8, 8, bias=bias)(features), features)


def test_identity_between_two_widths_is_refused():
    with pytest.raises(OptionError, match="from width 8 to 6 that starts as the identity"):
        build(8, 6, starts_as_identity=True)
