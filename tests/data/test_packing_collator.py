"""A packed batch: rows one behind the other, each with positions of its own, and nothing learned across."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mllm.data.collate import LeavingOut, PackingCollator, PaddingCollator
from mllm.data.examples import Example, Examples
from mllm.data.left_out import BAD, LeftOut
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.errors import MediaError
from mllm.testing import save_tiny_rows, tiny_model


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("parts"))[1]


@pytest.fixture
def examples(tmp_path, processor) -> Examples:
    paths = [save_tiny_rows(tmp_path / name, 4, num_images=lambda number: number % 3) for name in ("one", "other")]
    return Examples(open_mixture(read_mixture([str(path) for path in paths])), processor)


def test_rows_stand_one_behind_the_other(examples, processor):
    rows = [examples[number] for number in (2, 0, 3)]
    batch = PackingCollator(processor)(rows)
    lengths = tuple(len(row.input_ids) for row in rows)
    assert batch["segment_lengths"] == lengths
    assert set(batch) == {"input_ids", "labels", "position_ids", "segment_lengths", "pixel_values"}
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, sum(lengths))
    segments = zip(*(batch[name][0].split(lengths) for name in ("input_ids", "labels", "position_ids")), strict=True)
    for row, (ids, labels, positions) in zip(rows, segments, strict=True):
        assert ids.tolist() == row.input_ids.tolist()
        assert labels[0] == -100 and labels[1:].tolist() == row.labels[1:].tolist()
        assert positions.tolist() == list(range(len(row.input_ids)))


def test_the_first_label_of_a_row_is_not_asked_of_the_row_before(examples, processor):
    """As in a padded batch, where nothing stands before it."""
    row = examples[0]
    learned = replace(row, labels=row.input_ids.copy())
    batch = PackingCollator(processor)([learned, learned])
    length = len(row.input_ids)
    assert (batch["labels"] == -100).nonzero()[:, 1].tolist() == [0, length]
    padded = PaddingCollator(processor)([learned, learned])
    assert (padded["labels"][:, 1:] != -100).sum() == (batch["labels"][:, 1:] != -100).sum()


def test_media_are_those_of_the_padded_batch(examples, processor):
    rows = [examples[number] for number in (2, 1, 4)]
    packed, padded = (kind(processor)(rows)["pixel_values"] for kind in (PackingCollator, PaddingCollator))
    assert len(packed) == 3 and torch.equal(packed, padded)


def test_weights_travel_where_a_row_has_some(examples, processor):
    one, two = examples[0], examples[1]
    weights = np.linspace(0, 1, len(two.labels), dtype=np.float32)
    batch = PackingCollator(processor)([one, replace(two, loss_weights=weights)])
    assert batch["loss_weights"].tolist() == [[1.0] * len(one.labels) + weights.tolist()]


@pytest.mark.parametrize("kind", [PackingCollator, PaddingCollator])
def test_sources_are_one_number_a_row(examples, processor, kind):
    collate = kind(processor, source_of=examples.rows.source_number)
    assert collate([examples[number] for number in (5, 0, 7)])["sources"].tolist() == [1, 0, 1]
    assert collate([])["sources"].tolist() == []


def test_an_empty_micro_batch_has_a_segment_and_nothing_to_learn(processor):
    batch = PackingCollator(processor)([])
    assert batch["input_ids"].shape == (1, 2) and (batch["labels"] == -100).all()
    assert batch["segment_lengths"] == (2,) and batch["position_ids"].tolist() == [[0, 1]]


def test_a_row_that_cannot_be_trained_on_leaves_its_pack(examples, processor):
    damaged: Example = examples[1]
    path = damaged.row.media[0].path
    path.write_bytes(path.read_bytes()[:-100])
    collate = LeavingOut(PackingCollator(processor))
    batch, left_out, *_ = collate([examples[0], damaged, LeftOut(7, "too long"), examples[2]])
    assert [(row.position, row.reason) for row in left_out] == [(7, "too long"), (1, BAD)]
    assert isinstance(left_out[1].error, MediaError)
    expected = PackingCollator(processor)([examples[0], examples[2]])
    assert batch.keys() == expected.keys() and batch["segment_lengths"] == expected["segment_lengths"]
    assert all(torch.equal(batch[name], expected[name]) for name in batch if name != "segment_lengths")
