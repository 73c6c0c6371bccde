"""Preference rows that cannot be trained on, through `train/rdpo.py`: an error that says what to do, or quarantine."""

import json
import shutil
from pathlib import Path

import pytest

from mllm.errors import MediaError, OptionError, RowError
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.testing_pairs import save_tiny_pairs

NUM_ROWS = 8


def _same_sides(row, folder):
    row["rejected"] = row["chosen"]


def _empty_answer(row, folder):
    row["chosen"]["content"] = ""


def _nothing_retrieved(row, folder):
    del row["contrast"]


def _own_image(row, folder):
    row["contrast"] = row["media"]


def _copy_of_own_image(row, folder):
    shutil.copy(folder / row["media"][0]["path"], folder / "copy.png")
    row["contrast"] = [{**row["media"][0], "path": "copy.png"}]


def _two_retrieved(row, folder):
    row["contrast"] *= 2


def _missing_file(row, folder):
    row["contrast"][0]["path"] = "nowhere.png"


def _no_picture(row, folder):
    row["contrast"][0]["path"] = "pairs.jsonl"


def _one_answer(row, folder):
    del row["rejected"]


SPOILT = {
    _same_sides: (RowError, "chosen and rejected are the same"),
    _empty_answer: (RowError, "the chosen answer is empty"),
    _nothing_retrieved: (RowError, r"no retrieved image.*\n.*\n.*preset: dpo"),
    _own_image: (RowError, "the retrieved image is the row's own"),
    _copy_of_own_image: (MediaError, "copy.png, shows what the row's own shows"),
    _two_retrieved: (RowError, "2 media items"),
    _missing_file: (MediaError, "nowhere.png"),
    _no_picture: (MediaError, "pairs.jsonl"),
    _one_answer: (RowError, "rejected"),
}
each_kind = pytest.mark.parametrize("spoil", SPOILT, ids=[spoil.__name__[1:] for spoil in SPOILT])


@pytest.fixture
def spoilt(tmp_path):
    """Rows of which the third is spoilt."""

    def save(spoil) -> Path:
        path = save_tiny_pairs(tmp_path / "rows", NUM_ROWS)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        spoil(rows[2], path.parent)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return save


@each_kind
def test_a_broken_pair_stops_the_run(prefer, spoilt, tmp_path, spoil):
    kind, message = SPOILT[spoil]
    with pytest.raises(kind, match=message):
        prefer(tmp_path / "run", data=[str(spoilt(spoil))], max_steps=-1, num_train_epochs=1)


@each_kind
def test_or_is_listed_and_left_out(prefer, spoilt, tmp_path, spoil):
    source = {"path": str(spoilt(spoil)), "on_bad": "quarantine", "max_bad_rate": 0.2}
    run = prefer(tmp_path / "run", data=[source], max_steps=-1, num_train_epochs=1)
    (bad,) = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert bad["id"] == "2"
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert sum(line["pairs"] for line in lines if "pairs" in line) == NUM_ROWS - 1


def test_too_many_broken_pairs_stop_the_run(prefer, spoilt, tmp_path):
    source = {"path": str(spoilt(_same_sides)), "on_bad": "quarantine", "max_bad_rate": 0.1}
    with pytest.raises(MediaError, match="1 of 8 rows found to be broken"):
        prefer(tmp_path / "run", data=[source])


def test_a_batch_of_which_nothing_is_left_is_a_step_of_nothing(prefer, tmp_path):
    """Two pairs a batch; each second row shows the same picture twice."""
    path = save_tiny_pairs(tmp_path / "rows", 6)
    for number in range(6):
        shutil.copy(path.parent / f"{number}-own.png", path.parent / f"{number}-retrieved.png")
    fine = save_tiny_pairs(tmp_path / "fine", 1)
    sources = [{"path": str(path), "on_bad": "quarantine", "max_bad_rate": 1.0}, str(fine)]
    run = prefer(tmp_path / "run", data=sources, max_steps=-1, num_train_epochs=1, weight_decay=0.0)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "grad_norm" in line]
    assert sum(line["pairs"] for line in steps) == 1
    assert all(line["grad_norm"] == 0.0 and line["loss"] == 0.0 for line in steps if not line["pairs"])


def test_media_that_the_model_does_not_read_are_left_out(prefer, tmp_path):
    stock = save_stock_checkpoint(tmp_path / "stock", "qwen2_audio")
    path = save_tiny_pairs(tmp_path / "rows", 6, has_image=(0, 1))
    options = {"model": str(stock), "data": [str(path)], "parts": {"text": "lora"}, "preset": "dpo", "max_steps": 1}
    run = prefer(tmp_path / "run", **options)
    record = json.loads((run / "run.json").read_text())
    assert record["rows"] == {
        "used": 4, "dropped": {"image, for which the model has no tower": 2}, "measure": "encoded",
    }  # fmt: skip


def test_rows_with_and_without_pictures_train_together(prefer, tmp_path):
    path = save_tiny_pairs(tmp_path / "rows", 6, has_image=(0, 3))
    for batching in ({}, {"batching": "packed", "pack_length": 300, "per_device_train_batch_size": None}):
        run = prefer(tmp_path / f"run{len(batching)}", data=[str(path)], preset="dpo", max_steps=6, **batching)
        assert (run / "final" / "complete.json").is_file()


def test_a_pack_has_room_for_all_sides(prefer, tmp_path, pairs):
    options = {"batching": "packed", "per_device_train_batch_size": None, "max_steps": 1}
    prefer(tmp_path / "by default", max_length=60, **options)
    with pytest.raises(RowError, match=r"pack_length is 60\n.*\n.*each of a row's 3 conversations may be so long"):
        prefer(tmp_path / "run", max_length=60, pack_length=60, **options)
    with pytest.raises(OptionError, match="no row left"):
        prefer(tmp_path / "none", max_length=5, **options)


def test_preferences_are_no_rows_of_supervised_fine_tuning(train, pairs, tmp_path):
    with pytest.raises(RowError, match=r"a preference.*\n.*\n.*train/rdpo.py"):
        train(tmp_path / "run", data=[str(pairs)], parts={"text": "full"})


def test_features_of_frozen_encoders_are_kept_for_pairs_too(prefer, tmp_path):
    options = {"preset": "rdpo", "max_steps": 4, "optim": "sgd", "learning_rate": 0.3}
    runs = [prefer(tmp_path / "plain", **options), prefer(tmp_path / "cached", feature_cache="cache", **options)]
    losses = [[json.loads(line).get("loss") for line in (run / "log.jsonl").read_text().splitlines()] for run in runs]
    assert [one for one in losses[0] if one] == pytest.approx([one for one in losses[1] if one], abs=1e-5)
