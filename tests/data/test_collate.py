import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mllm.data.collate import LeavingOut, PaddingCollator
from mllm.data.examples import Example, Examples
from mllm.data.left_out import BAD, LeftOut, usable_batches
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.errors import MediaError
from mllm.testing import save_tiny_rows, tiny_model


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("parts"))[1]


@pytest.fixture
def examples(tmp_path, processor):
    return Examples(open_mixture(read_mixture([str(save_tiny_rows(tmp_path / "rows", 6))])), processor)


def test_padding_is_masked_by_length_and_a_padding_id_in_the_text_is_not(examples, processor):
    collate = PaddingCollator(processor)
    one, two = examples[0], examples[4]
    ids = np.array([collate.pad_id, *one.input_ids[1:]], dtype=np.int32)  # a text that begins with the padding token
    batch = collate([Example(one.row, ids, one.labels, None), two])
    lengths = [len(one.input_ids), len(two.input_ids)]
    assert lengths[0] < lengths[1]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["attention_mask"][0, 0] == 1
    assert (batch["input_ids"][0, lengths[0] :] == collate.pad_id).all()
    assert (batch["labels"][0, lengths[0] :] == -100).all()
    assert batch["input_ids"][1].tolist() == two.input_ids.tolist()
    assert "loss_weights" not in batch and "position_ids" not in batch


def test_images_in_order_of_appearance_and_absent_without_any(examples, processor):
    collate = PaddingCollator(processor)
    batch = collate([examples[n] for n in (2, 0, 1)])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert torch.equal(batch["pixel_values"][:1], collate([examples[2]])["pixel_values"])
    assert "pixel_values" not in collate([examples[0]])


def test_uneven_weights_travel_and_even_ones_fill_up(examples, processor):
    one, two = examples[0], examples[4]
    weights = np.where(one.labels == -100, 0.0, 0.5).astype(np.float32)
    batch = PaddingCollator(processor)([Example(one.row, one.input_ids, one.labels, weights), two])
    length = len(one.input_ids)
    assert batch["loss_weights"][0, :length].tolist() == weights.tolist()
    assert (batch["loss_weights"][0, length:] == 0).all() and (batch["loss_weights"][1] == 1).all()


def test_an_empty_micro_batch_has_tokens_and_nothing_to_learn(processor):
    batch = PaddingCollator(processor)([])
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert batch["input_ids"].shape == (1, 2) and (batch["labels"] == -100).all() and batch["attention_mask"].all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_damaged_behind_its_header_is_raised_with_its_name(examples, processor, num_workers):
    _damage(examples[1])
    loader = DataLoader(
        examples, batch_size=1, collate_fn=LeavingOut(PaddingCollator(processor)), num_workers=num_workers
    )
    with pytest.raises(MediaError, match="row 'row-1' .*damaged") as caught:
        list(usable_batches(loader))
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_cannot_be_trained_on_is_left_out_of_its_batch_and_told(examples, processor, num_workers):
    _damage(examples[1])
    collate = PaddingCollator(processor)
    loader = DataLoader(examples, batch_size=3, collate_fn=LeavingOut(collate), num_workers=num_workers)
    told = []
    batches = list(usable_batches(loader, told.append))
    expected = [collate([examples[n] for n in rows]) for rows in ((0, 2), (3, 4, 5))]
    for batch, wanted in zip(batches, expected, strict=True):
        assert batch.keys() == wanted.keys() and all(torch.equal(batch[key], wanted[key]) for key in batch)
    (row,) = told
    assert (row.position, row.reason, row.bad.id, row.is_error) == (1, BAD, "row-1", False)
    assert row.bad.file == str(examples[1].row.media[0].path) and "damaged" in row.bad.reason
    assert isinstance(row.error, MediaError)


def test_a_batch_of_which_nothing_is_left_is_an_empty_one(processor):
    batch, left_out, *_ = LeavingOut(PaddingCollator(processor))([LeftOut(3, "too long"), LeftOut(4, "too long")])
    assert (batch["labels"] == -100).all() and batch["input_ids"].shape == (1, 2)
    assert [row.position for row in left_out] == [3, 4]


def test_errors_survive_the_way_out_of_a_worker():
    error = pickle.loads(pickle.dumps(MediaError("a", expected="b", do="c")))
    assert isinstance(error, MediaError) and (error.found, error.expected, error.do) == ("a", "b", "c")


def _damage(example: Example) -> None:
    path = example.row.media[0].path
    path.write_bytes(path.read_bytes()[:-100])
