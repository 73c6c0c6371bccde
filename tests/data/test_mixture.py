"""Rows of several sources: which are taken, where they come from, what an epoch draws of what is left of them."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from mllm.data.mixture import Mixture, Take, parse_take
from mllm.data.schema import Row
from mllm.data.sources import Source
from mllm.errors import OptionError


@dataclass
class Index:
    """As `mllm.data.indexing.index.RowIndex`, of rows that are only numbers."""

    source: Source
    size: int
    key: str = "0123456789abcdef0123"
    num_bad: int = 0
    dropped: Counter = field(default_factory=Counter)
    licence: str = "as published"

    def __len__(self):
        return self.size

    def __getitem__(self, number):
        assert isinstance(number, int) and 0 <= number < self.size
        return Row(id=f"{self.source.path}-{number}", source="", messages=[], media=(), where="")

    @property
    def char_lengths(self):
        return np.arange(self.size, dtype=np.int32)


def test_rows_stand_one_behind_the_other_and_know_their_source():
    one, two = Index(Source("one", take="first:2"), 5), Index(Source("two", take="end:3"), 4)
    rows = Mixture([one, two])
    assert [row.id for row in rows] == ["one-0", "one-1", "two-1", "two-2", "two-3"]
    assert [rows.source(position).path for position in range(5)] == ["one"] * 2 + ["two"] * 3
    assert rows.char_lengths.tolist() == [0, 1, 1, 2, 3]
    for position in (5, -1):
        with pytest.raises(IndexError):
            rows[position]


@pytest.mark.parametrize(
    ("take", "expected"),
    [
        ("all", range(10)),
        ("first:3", range(3)),
        ("end:3", range(7, 10)),
        ("first:25%", range(3)),  # 2.5, rounded up as LLaVA-NeXT does
        ("end:10%", range(9, 10)),
        ("first:99", range(10)),
        ("end:100%", range(10)),
    ],
)
def test_take_rules(take, expected):
    assert parse_take(take).positions(10, [0]).tolist() == list(expected)


def test_a_percentage_is_of_the_rows_and_not_of_its_rounding():
    assert len(parse_take("first:1.1%").positions(1000, [0])) == 11
    assert len(parse_take("first:7%").positions(100, [0])) == 7


def test_random_rows_are_the_seeds_and_fewer_are_part_of_more():
    some, more = (parse_take(f"random:{share}").positions(1000, [1, 2]).tolist() for share in ("10%", "300"))
    assert len(some) == 100 and len(more) == 300 and set(some) < set(more)
    assert some == sorted(some) and some == parse_take("random:10%").positions(1000, [1, 2]).tolist()
    assert some != parse_take("random:10%").positions(1000, [3, 2]).tolist()


def test_random_rows_stay_when_sources_change_places():
    one = Index(Source("one", take="random:3"), 50, key="a" * 20)
    two = Index(Source("two", take="random:3"), 50, key="b" * 20)
    here, there = Mixture([one, two], seed=4), Mixture([two, one], seed=4)
    assert [row.id for row in here] == [there[n].id for n in (3, 4, 5, 0, 1, 2)]
    assert [row.id for row in here] != [row.id for row in Mixture([one, two], seed=5)]


@pytest.mark.parametrize("text", ["first", "first:0", "end:", "random:-1", "random:0%", "first:101%", "last:3", 5, ""])
def test_wrong_rules(text):
    with pytest.raises(OptionError, match="take = .*"):
        parse_take(text)
    assert parse_take("all") == Take("all")


def test_shares_hold_for_the_rows_that_are_used():
    rows = Mixture([Index(Source("one", weight=1.0), 8), Index(Source("two", weight=1.0), 8)])
    order = rows.order_of([0, 1, 8, 9, 10, 11, 12, 13])
    assert order.sizes == (2, 6) and order.counts == (4, 4)
    assert Counter(order(0, 0).tolist())[0] == 2
    assert np.array_equal(rows.epoch_order(2, 3), rows.order(2, 3)) and len(rows.order) == 16


def test_fingerprints_say_what_was_used_of_what():
    index = Index(Source("one", name="n", take="first:2", revision="r"), 5, num_bad=1, dropped=Counter(odd=2))
    assert Mixture([index]).fingerprints() == [
        {"path": "one", "name": "n", "sha256": index.key, "revision": "r", "licence": "as published",
         "take": "first:2", "weight": None, "rows": 2, "bad": 1, "dropped": {"odd": 2}}
    ]  # fmt: skip


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(OptionError, match=r"one has no rows \(3 bad, 0 dropped\)"):
        Mixture([Index(Source("one"), 0, num_bad=3)])
    with pytest.raises(OptionError, match="one: weight = -1"):
        Mixture([Index(Source("one", weight=-1.0), 2)])
