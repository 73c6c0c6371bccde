"""Losses by source: which token is whose, sums over batches, names."""

from pathlib import Path

import pytest
import torch

from mllm.data.sources import Source
from mllm.training.source_losses import (
    SourceLosses,
    num_supervised,
    source_names,
    token_sources,
    with_token_sources,
)

LABELS = torch.tensor([[-100, 7, -100, 7], [5, -100, 7, 7], [-100, -100, -100, 7]])


def test_tokens_of_padded_rows():
    assert token_sources(LABELS, torch.tensor([1, 0, 1])).tolist() == [1, 1, 0, 0, 1]


def test_tokens_of_packed_segments():
    labels = torch.tensor([[-100, 7, -100, 7, -100, 7, 7, -100, 7]])
    assert token_sources(labels, torch.tensor([2, 0, 1]), (4, 3, 2)).tolist() == [2, 2, 0, 0, 1]


def test_there_are_as_many_as_the_loss_has_terms():
    assert num_supervised(LABELS) == len(token_sources(LABELS, torch.tensor([0, 0, 0]))) == 5


def test_each_source_is_a_mean_over_its_tokens():
    losses = SourceLosses(["one", "two", "none"])
    batch = with_token_sources({"labels": LABELS, "sources": torch.tensor([1, 0, 1])})
    losses.add(batch["sources"], torch.tensor([1.0, 2.0, 3.0, 4.0, 6.0]))
    losses.add(batch["sources"], torch.tensor([1.0, 2.0, 4.0, 5.0, 6.0]))
    assert losses.read() == {
        "supervised_tokens": 10, "loss": pytest.approx(3.4), "loss/one": pytest.approx(4.0),
        "loss/two": pytest.approx(3.0),
    }  # fmt: skip
    assert losses.read() == {"supervised_tokens": 0}


def test_a_batch_without_a_supervised_token_is_counted_and_weighs_nothing():
    losses = SourceLosses(["one"])
    empty = {"labels": torch.full((1, 2), -100), "sources": torch.tensor([], dtype=torch.long)}
    for batch in (empty, {**empty, "segment_lengths": (2,)}):
        losses.add(with_token_sources(batch)["sources"], torch.zeros(0))
    losses.add(torch.tensor([0]), torch.tensor([2.0]))
    assert losses.read() == {"supervised_tokens": 1, "loss": 2.0, "empty_micro_batches": 2}


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        ([("a/train.json", ""), ("b/train.json", ""), ("coco.jsonl", "")], ("a/train", "b/train", "coco")),
        ([("a/train.json", "mine"), ("b/train.json", "")], ("mine", "train")),
        ([("x/a/train.json", ""), ("y/a/train.json", "")], ("a/train", "a/train#2")),
        ([("rows.jsonl", ""), ("rows.jsonl", "")], ("rows", "rows#2")),
        ([("hub://org/set", ""), ("data/rows.tar.gz", "")], ("set", "rows")),
    ],
)
def test_names_are_readable_and_no_two_alike(sources, names):
    made = [Source(path if "://" in path else Path(path), name=name) for path, name in sources]
    assert source_names(made) == names
