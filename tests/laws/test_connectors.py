"""What every connector of the table keeps to, whatever it computes.

A connector that joins the table joins `CASES`, and all laws run on it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mllm.models.configuration import MllmTowerConfig
from mllm.models.connectors import (
    CONNECTORS,
    Layout,
    Question,
    build_connector,
    connector_options,
    num_parameters,
    written_connector,
)
from mllm.models.connectors.base import Features
from mllm.models.modeling import MllmTower
from mllm.sizes import ImageTokenRule, LengthRule, num_joined_tokens, written_rule

WIDTH = 16
"""Of the language model."""


@dataclass(frozen=True)
class Case:
    """One connector with options that make it small.

    Args:
        name: In the table.
        options: Its own.
        widths: Of the features; several where it reads several streams.
        lengths: How many features of each view count; views are as long as the longest.
        streams: Where there are several, how many features each has; all of them count.
        has_question: Whether it reads what is asked.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    widths: tuple[int, ...] = (12,)
    lengths: tuple[int, ...] = (9, 4, 1)
    streams: tuple[int, ...] = ()
    has_question: bool = False

    @property
    def rule(self) -> LengthRule:
        """How many vectors it makes of how many features."""
        return connector_options({"type": self.name, **self.options})[1].length_rule()

    @property
    def on_grid(self) -> bool:
        """Whether it merges neighbours on the grid of a view, so that `per: item` is refused."""
        return self.rule.kind == "grid"

    def config(self, **common: Any) -> MllmTowerConfig:
        """Of a tower without an encoder."""
        choice = written_connector({"type": self.name, **self.options, **common})
        rule = ImageTokenRule(image_size=24, patch_size=8, num_prefix_tokens=0, feature_select="full")
        return MllmTowerConfig(
            connector=choice, feature_sizes=list(self.widths), text_hidden_size=WIDTH, rule=written_rule(rule)
        )

    def build(self, **common: Any):
        """The connector, in eval mode."""
        torch.manual_seed(1)
        return build_connector(self.config(**common)).eval()

    def features(self, num_views: int | None = None) -> Features:
        """Of as many views as there are lengths, or of so many."""
        generator = torch.Generator().manual_seed(2)
        views, lengths = num_views or len(self.lengths), self.streams or (max(self.lengths),)
        shapes = [(views, length, width) for length, width in zip(lengths, self.widths, strict=True)]
        streams = tuple(torch.randn(shape, generator=generator) for shape in shapes)
        return streams if self.streams else streams[0]

    def question(self, num_items: int) -> Question | None:
        """Of each item, of unequal length."""
        if not self.has_question:
            return None
        ids = torch.randint(0, 20, (num_items, 5), generator=torch.Generator().manual_seed(3))
        lengths = torch.tensor([5 - number % 3 for number in range(num_items)])
        return Question(ids, (torch.arange(5) < lengths[:, None]).long())

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])


GRID = {"lengths": (9, 9, 9)}
"""All features of a grid count."""
QFORMER = {"num_queries": 3, "layers": 2, "hidden_size": 8, "heads": 2, "intermediate_size": 10}
STREAMS = {"widths": (12, 10), "lengths": (9, 9, 9), "streams": (5, 4)}
"""Of several streams all features of a view count."""

CASES = (
    Case("linear"),
    Case("mlp"),
    Case("mlp", {"layers": 3, "activation": "silu", "bias": False}),
    Case("patch_merge", **GRID),
    Case("patch_merge", {"size": 3, "layers": 1, "norm": False}, **GRID),
    Case("pool", {"layers": 1}),
    Case("pool", {"size": 4, "keeps_incomplete": False, "norm": True}),
    Case("pool", {"over": "grid"}, **GRID),
    Case("frame_stack"),
    Case("frame_stack", {"size": 2, "norm": True, "bias": True}),
    Case("perceiver", {"num_latents": 3, "depth": 2, "heads": 4, "key_value_heads": 2, "head_size": 4}),
    Case("perceiver", {"num_latents": 3, "depth": 1, "heads": 4, "head_size": 4, "width": 8, "projection": 10}),
    Case("identity", widths=(WIDTH,)),
    Case("streams"),
    Case("streams", **STREAMS),
    Case("qformer", QFORMER),
    Case("qformer", {**QFORMER, "layers": 1, "feature_norm": True}),
    Case("windowed_qformer", {**QFORMER, "window": 4}),
    Case("instruct_qformer", {**QFORMER, "vocab_size": 20}, has_question=True),
    Case("instruct_qformer", {**QFORMER, "layers": 1, "vocab_size": 20}, has_question=True),
    Case("multi_stream_qformer", {**QFORMER, "num_local_queries": 2, "feature_norm": True}, **STREAMS),
)

every_case = pytest.mark.parametrize("case", CASES, ids=str)
PERS = [
    pytest.param(case, per, id=f"{case}-per-{per}")
    for case in CASES
    for per in ("view", "item")
    if per == "view" or not case.on_grid
]


def _layout(*views: tuple[int, ...]) -> Layout:
    return Layout(list(views), [(0, 0)] * len(views))


def _alone(case: Case) -> Layout:
    """Each view an item of its own."""
    return _layout(*((length,) for length in case.lengths))


def _each(features: Features, change: Callable[[torch.Tensor], torch.Tensor]) -> Features:
    """Change the features, of every stream where there are several."""
    return tuple(map(change, features)) if isinstance(features, tuple) else change(features)


def test_every_connector_of_the_table_is_under_these_laws():
    assert {case.name for case in CASES} == CONNECTORS.keys()


@every_case
def test_there_are_as_many_vectors_as_were_counted(case):
    connector, features = case.build(), case.features()
    rule = case.rule
    vectors = connector(features, _alone(case), case.question(len(case.lengths)))
    assert [len(one) for one in vectors] == [rule.count(length) for length in case.lengths]
    whole = connector(features, None, case.question(len(case.lengths)))
    assert whole.shape == (len(case.lengths), rule.count(max(case.lengths)), WIDTH)
    assert all(torch.isfinite(one).all() for one in [*vectors, whole])


@every_case
def test_several_views_of_an_item_are_counted_too(case):
    """Each view by itself, or all of them as one sequence."""
    features, full, question = case.features(4), max(case.lengths), case.question(2)
    layout = _layout((full, case.lengths[-1]), (full, full))
    rule = case.rule
    vectors = case.build()(features, layout, question)
    assert [len(one) for one in vectors] == [sum(map(rule.count, views)) for views in layout.views]
    if case.on_grid:
        return
    joined = case.build(per="item")(features, layout, question)
    rules = ImageTokenRule(image_size=24, patch_size=8, num_prefix_tokens=0, feature_select="full", connector=rule)
    assert [len(one) for one in joined] == [num_joined_tokens(views, rules) for views in layout.views]


@every_case
def test_the_number_of_parameters_is_known_before(case):
    for common in ({}, {"positions": 4}):
        built = case.build(**common)
        assert num_parameters(case.config(**common)) == sum(one.numel() for one in built.parameters())


@every_case
def test_gradients_reach_every_parameter_and_every_feature_that_counts(case):
    connector = case.build(positions=2).train()
    features = _each(case.features(), torch.Tensor.requires_grad_)
    views = _layout(case.lengths[:2], *((length,) for length in case.lengths[2:]))
    vectors = torch.cat(connector(features, views, case.question(len(views.views))))
    (vectors * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
    unreached = [name for name, one in connector.named_parameters() if one.grad is None or not one.grad.any()]
    assert not unreached
    if isinstance(features, tuple):
        assert all(stream.grad.any(-1).all() for stream in features)
        return
    for gradient, length in zip(features.grad, case.lengths, strict=True):
        counted = _counted(connector.length_rule, length)
        assert gradient[:counted].any(-1).all() and not gradient[length:].any()


def _counted(rule: LengthRule, length: int) -> int:
    """Features of so many that are read: those of an incomplete last window may not be."""
    if rule.kind == "windows" and not rule.rounds_up and length >= rule.size:
        return length // rule.size * rule.size
    return length


@pytest.mark.parametrize(("case", "per"), [one for one in PERS if min(one.values[0].lengths) < 9])
def test_padding_changes_nothing(case, per):
    """Neither what stands in it, nor how much of it there is."""
    connector, features, question = case.build(per=per), case.features(), case.question(len(case.lengths))
    expected = connector(features, _alone(case), question)
    other = features.clone()
    for view, length in zip(other, case.lengths, strict=True):
        view[length:] = 1e4
    found = connector(other, _alone(case), question)
    assert all(torch.equal(one, another) for one, another in zip(found, expected, strict=True))
    longer = torch.nn.functional.pad(features, (0, 0, 0, 3), value=7.0)
    for one, another in zip(connector(longer, _alone(case), question), expected, strict=True):
        torch.testing.assert_close(one, another, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("case", "per"), PERS)
def test_an_item_alone_gives_what_it_gives_among_others(case, per):
    connector = case.build(per=per, positions=3)
    features, question = case.features(), case.question(2)
    views = [case.lengths[:2], case.lengths[2:]]
    together = connector(features, _layout(*views), question)
    for number, part in enumerate((slice(0, 2), slice(2, None))):
        asked = None if question is None else Question(*(one[number : number + 1] for one in question))
        (alone,) = connector(_each(features, lambda one, part=part: one[part]), _layout(views[number]), asked)
        torch.testing.assert_close(together[number], alone, rtol=0, atol=2e-6)


@every_case
def test_views_have_positions_if_there_is_a_table(case):
    """The same view, twice in an item, gives the same vectors twice; with a table it does not."""
    features = _each(case.features(1), lambda one: one.repeat(2, 1, 1))
    full, question = max(case.lengths), case.question(1)
    (plain,) = case.build()(features, _layout((full, full)), question)
    torch.testing.assert_close(plain[: len(plain) // 2], plain[len(plain) // 2 :], rtol=0, atol=2e-6)
    connector = case.build(positions=2)
    torch.nn.init.normal_(connector.positions.weight)
    (placed,) = connector(features, _layout((full, full)), question)
    assert not torch.allclose(placed[: len(placed) // 2], placed[len(placed) // 2 :], atol=1e-3)


@every_case
def test_saved_and_loaded_it_gives_the_same(case, tmp_path):
    """Weights, and all options, also those that were not named."""
    torch.manual_seed(5)
    tower = MllmTower(case.config(positions=3)).eval()
    features, question = case.features(), case.question(len(case.lengths))
    expected = tower.connector(features, _alone(case), question)
    tower.save_pretrained(tmp_path)
    loaded = MllmTower.from_pretrained(tmp_path).eval()
    assert loaded.config.connector == tower.config.connector
    state = loaded.state_dict()
    assert all(torch.equal(state[name], one) for name, one in tower.state_dict().items())
    for one, another in zip(loaded.connector(features, _alone(case), question), expected, strict=True):
        torch.testing.assert_close(one, another, rtol=0, atol=1e-6)  # of weights that lie elsewhere in memory
    written = json.loads((tmp_path / "config.json").read_text())["connector"]
    assert written_connector(written) == written


@every_case
def test_in_bfloat16_it_gives_nearly_the_same(case):
    connector, features, question = case.build(positions=3), case.features(), case.question(len(case.lengths))
    expected = torch.cat(connector(features, _alone(case), question))
    half = torch.cat(connector.bfloat16()(_each(features, torch.Tensor.bfloat16), _alone(case), question))
    assert half.dtype == torch.bfloat16
    # Eight bits of mantissa, a few roundings in a row.
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.04 * expected.abs().max().item())
