"""A pruner as programs are told of it becomes that pruner, or an error that says what would."""

from dataclasses import dataclass, fields
from typing import Literal

import pytest

from mllm.errors import OptionError
from mllm.pruning import PRUNERS, Pruner, build_pruner
from mllm.pruning.spec import read_spec


@dataclass
class Probe(Pruner):
    """With an option of every kind."""

    share: float = 0.5
    name: str = "a b"
    is_quick: bool = True
    layers: tuple[int, ...] | None = None
    pair: tuple[int, str] = (1, "x")
    rule: Literal["first", "last"] = "first"


PROBE = {"probe": Probe}


@pytest.mark.parametrize("name", PRUNERS)
def test_every_method_can_be_built_by_its_name_and_with_each_of_its_defaults(name):
    assert type(build_pruner(name)) is PRUNERS[name]
    made = build_pruner(f"{name} tokens=3 positions=original")
    assert (made.tokens, made.positions) == (3, "original")
    plain = PRUNERS[name]()
    texts = [f"'{field.name}={written(getattr(plain, field.name))}'" for field in fields(plain) if field.init]
    assert build_pruner(" ".join([name, *texts])) == plain


def written(value) -> str:
    if value is None:
        return "null"
    return str(list(value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("tokens=7", "tokens", 7),
        ("tokens=0.25", "tokens", 0.25),
        ("share=1", "share", 1.0),
        ("is_quick=false", "is_quick", False),
        ("name=12", "name", "12"),
        ("'name=two words'", "name", "two words"),
        ("layers=[2,6,15]", "layers", (2, 6, 15)),
        ("layers=null", "layers", None),
        ("'pair=[3, y]'", "pair", (3, "y")),
        ("rule=last", "rule", "last"),
    ],
)
def test_values_are_of_the_options_types(text, name, value):
    found = getattr(read_spec(f"probe {text}", PROBE), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "(?s)without a name.*one of probe"),
        ("fastest tokens=3", "(?s)pruner 'fastest'.*one of probe"),
        ("tokens=3", "(?s)pruner 'tokens=3'.*name one of them first"),
        ("probe token=3", r"(?s)'token', which it does not have.*tokens=64, positions=original, share=0.5"),
        ("probe statistics=3", "'statistics', which it does not have"),
        ("probe 3", "'3', without a value"),
        ("probe tokens=3 tokens=4", "'tokens', twice"),
        ("probe tokens=33%", "(?s)tokens = 33%.*a whole number or a number"),
        ("probe tokens=true", "tokens = true"),
        ("probe is_quick=1", "(?s)is_quick = 1.*true or false"),
        ("probe layers=[1,a]", r"(?s)layers = \[1,a\].*a list such as \[1, 2\], each a whole number or null"),
        ("probe pair=[1]", "pair ="),
        ("probe rule=middle", "(?s)rule = middle.*one of first, last"),
        ("probe 'tokens=3", "(?s)No closing quotation"),
        ("probe tokens=0", "(?s)tokens = 0.*1 or more"),
    ],
)
def test_what_cannot_be_is_refused_with_the_choices(spec, message):
    with pytest.raises(OptionError, match=message):
        read_spec(spec, PROBE)
