"""`train/sft.py`, run in this process."""

import json
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file

from mllm import load_model, load_processor
from mllm.data import examples
from mllm.data.indexing.index import open_index
from mllm.data.indexing.token_counts import count_tokens
from mllm.data.sources import Source
from mllm.errors import CheckpointError, CompositionError, MediaError, OptionError
from mllm.load import merged
from mllm.testing import save_tiny_parts, save_tiny_rows
from mllm.training.arguments import SftArguments, build_arguments
from mllm.training.sft import SftTrainer
from mllm.training.start import check_launch

CONNECTOR = {"image.connector": "full"}
LORA = {"image.connector": "full", "text": {"mode": "lora", "rank": 4}}
FULL = {"image.encoder": "full", "image.connector": "full", "text": "full"}


def test_the_real_optimizer_has_the_rates_and_decay_of_the_parts(train, tmp_path, monkeypatch):
    trainers = []
    monkeypatch.setattr(SftTrainer, "save_final", lambda trainer: trainers.append(trainer))
    parts = {"image.connector": {"mode": "full", "learning_rate": 1e-3}, "text": {"mode": "lora", "rank": 4}}
    train(
        tmp_path,
        parts=parts,
        learning_rate=4e-3,
        weight_decay=0.1,
        lr_scheduler_type="linear",
        max_steps=4,
        save_steps=2,
    )
    optimizer = trainers[0].optimizer
    assert isinstance(optimizer, AcceleratedOptimizer)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: (group["initial_lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "image.connector/decayed": (1e-3, 0.1),
        "image.connector/not decayed": (1e-3, 0.0),
        "text/decayed": (4e-3, 0.1),
    }
    assert all(group["lr"] == 0.0 for group in groups.values())  # the schedule came to its end in each
    held = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trainers[0].model.parameters() if p.requires_grad)


@pytest.mark.parametrize("parts", [FULL, LORA], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing(train, tmp_path, parts):
    plain = train(tmp_path / "plain", parts=parts, optim="sgd")
    again = train(tmp_path / "again", parts=parts, optim="sgd", gradient_checkpointing=True)
    one, other = (merged(load_model(run / "final")).state_dict() for run in (plain, again))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5, msg=name)


def test_mixed_precision_keeps_the_weights_in_float32(train, tmp_path):
    saved = load_file(train(tmp_path / "run", parts=FULL, bf16=True) / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all(line["loss"] < 10 for line in _log(tmp_path / "run") if "loss" in line)


@pytest.mark.parametrize("parts", [CONNECTOR, LORA], ids=["full", "lora"])
def test_weights_of_bfloat16(train, tmp_path, parts):
    final = train(tmp_path / "run", parts=parts, dtype="bfloat16") / "final"
    assert all(torch.isfinite(parameter).all() for parameter in load_model(final).parameters())


def test_without_checkpoints_there_is_a_model_and_a_second_start_says_so(train, tmp_path, capsys):
    out = train(tmp_path / "run", parts=LORA)
    assert sorted(path.name for path in out.iterdir()) == ["final", "log.jsonl", "run.json"]
    before = (out / "final" / "complete.json").stat().st_mtime_ns
    train(out, parts=LORA)
    assert f"finished before: {out / 'final'}" in capsys.readouterr().out
    assert (out / "final" / "complete.json").stat().st_mtime_ns == before


def test_another_run_is_refused(train, tmp_path):
    out = train(tmp_path / "run", parts=LORA)
    with pytest.raises(CheckpointError, match="other options: learning_rate = 0.01, now 0.02"):
        train(out, parts=LORA, learning_rate=0.02)


def test_text_alone_with_only_a_connector_to_train(train, tmp_path, assembled):
    """There is nothing to learn for it, and nothing to stop at either."""
    text = save_tiny_rows(tmp_path / "rows", 4, num_images=lambda number: 0)
    final = load_model(train(tmp_path / "run", data=[str(text)], parts=CONNECTOR, max_steps=2) / "final")
    for one, other in zip(load_model(assembled).parameters(), final.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_console_shows_no_dictionaries(train, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        train(tmp_path / "run", parts=LORA, logging_steps=1, disable_tqdm=False)
    shown = capsys.readouterr()
    assert "{'" not in shown.out + shown.err
    assert "rows: 12 used, dropped: none" in shown.out and "loss=" in shown.err
    log = _log(tmp_path / "run")
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_damaged_behind_its_header_ends_the_run_with_its_name(train, tmp_path, num_workers):
    rows = save_tiny_rows(tmp_path / "rows", 4, num_images=lambda number: 1)
    image = tmp_path / "rows" / "images" / "2-0.png"
    image.write_bytes(image.read_bytes()[:-100])
    with pytest.raises(MediaError, match="row 'row-2' .*damaged"):
        train(tmp_path / "run", data=[str(rows)], parts=CONNECTOR, dataloader_num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_in_quarantine_leaves_its_row_out(train, tmp_path, capsys, num_workers):
    """The run equals one without that row in its batches, says so, and goes on counting where it was left."""
    rows = save_tiny_rows(tmp_path / "rows", 6, num_images=lambda number: 1)
    image = tmp_path / "rows" / "images" / "2-0.png"
    image.write_bytes(image.read_bytes()[:-100])
    (tmp_path / "rows" / "images" / "4-0.png").unlink()
    options = {
        "data": [str(rows)], "on_bad": "quarantine", "max_bad_rate": 0.2, "parts": CONNECTOR, "max_steps": 6,
        "save_strategy": "steps", "save_steps": 3, "dataloader_num_workers": num_workers,
    }  # fmt: skip
    run = train(tmp_path / "run", **options)
    entries = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert [(entry["id"], entry["found"]) for entry in entries] == [("row-4", "indexing"), ("row-2", "training")]
    assert "damaged" in entries[1]["reason"] and entries[1]["file"].endswith("2-0.png")
    record = json.loads((run / "final" / "run.json").read_text())
    assert record["rows"]["used"] == 5 and record["data"][0]["bad"] == 1
    assert record["rows"]["left_out"] == {"bad row or media": 2}  # once an epoch
    assert "rows left out of their batches: {'bad row or media': 2}" in capsys.readouterr().out
    straight = (run / "final" / "model.safetensors").read_bytes()
    for name in ("checkpoint-6", "final"):
        shutil.rmtree(run / name)
    train(run, **options)
    assert (run / "final" / "model.safetensors").read_bytes() == straight
    assert json.loads((run / "final" / "run.json").read_text())["rows"] == record["rows"]
    assert len((run / "quarantine.jsonl").read_text().splitlines()) == 2


def test_too_many_damaged_images_end_the_run(train, tmp_path):
    rows = save_tiny_rows(tmp_path / "rows", 6, num_images=lambda number: 1)
    for number in (2, 3):
        image = tmp_path / "rows" / "images" / f"{number}-0.png"
        image.write_bytes(image.read_bytes()[:-100])
    options = {"on_bad": "quarantine", "max_bad_rate": 0.2, "parts": CONNECTOR}
    with pytest.raises(MediaError, match="2 of 6 rows found to be broken"):
        train(tmp_path / "run", data=[str(rows)], **options)


def test_a_step_of_which_every_row_is_left_out_learns_nothing(train, tmp_path):
    rows = save_tiny_rows(tmp_path / "rows", 2, num_images=lambda number: 1)
    for number in (0, 1):
        image = tmp_path / "rows" / "images" / f"{number}-0.png"
        image.write_bytes(image.read_bytes()[:-100])
    run = train(
        tmp_path / "run", data=[str(rows)], on_bad="quarantine", max_bad_rate=1.0, parts=FULL, optim="sgd",
        weight_decay=0.0, max_steps=1, logging_steps=1, logging_nan_inf_filter=False,
    )  # fmt: skip
    assert [line["loss"] for line in _log(run) if "loss" in line] == [0.0]
    assert all(torch.isfinite(parameter).all() for parameter in load_model(run / "final").parameters())


def test_a_large_mixture_is_trained_on_as_a_small_one_is(train, rows, tmp_path, monkeypatch):
    """Rows that turn out too long leave their batches; without any, encoding when due changes nothing."""
    shutil.rmtree(open_index(Source(rows)).derived_dir, ignore_errors=True)  # another test may have counted them
    small = train(tmp_path / "small", parts=LORA)
    monkeypatch.setattr(examples, "ENCODED_AT_START", 5)
    large = train(tmp_path / "large", parts=LORA, dataloader_num_workers=1)
    weights = Path("final", "adapter_model.safetensors")
    assert (small / weights).read_bytes() == (large / weights).read_bytes()
    cut = train(tmp_path / "cut", parts=LORA, max_length=45, max_steps=6)
    record = json.loads((cut / "final" / "run.json").read_text())
    assert record["rows"]["used"] == 12 and record["rows"]["measure"] == "bounded"
    monkeypatch.undo()
    measured = json.loads((train(tmp_path / "drop", parts=LORA, max_length=45) / "run.json").read_text())["rows"]
    assert record["rows"]["left_out"] == measured["dropped"] and measured["used"] < 12


def test_a_run_goes_on_with_the_measure_it_began_with(train, rows, assembled, tmp_path, monkeypatch):
    """Rows that were counted meanwhile would not be drawn, and the order would be another."""
    monkeypatch.setattr(examples, "ENCODED_AT_START", 5)
    options = {"parts": LORA, "max_length": 45, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    run = train(tmp_path / "run", **options)
    straight = (run / "final" / "adapter_model.safetensors").read_bytes()
    index = open_index(Source(rows))
    counts = count_tokens(index, load_processor(assembled))
    try:
        assert (counts > 45).any()
        for name in ("checkpoint-4", "checkpoint-6", "final"):
            shutil.rmtree(run / name)
        train(run, **options)
        assert (run / "final" / "adapter_model.safetensors").read_bytes() == straight
        other = train(tmp_path / "other", **options)
        assert json.loads((other / "run.json").read_text())["rows"]["measure"] == "counted"
    finally:
        shutil.rmtree(index.derived_dir)  # other tests share these rows


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"parts": {"vision": "full"}}, OptionError, "parts: 'vision'"),
        ({"parts": {}}, OptionError, "every part is frozen"),
        ({"data": ["none.jsonl"], "parts": CONNECTOR}, OptionError, "none.jsonl is not there"),
        ({"model": "none", "parts": CONNECTOR}, CheckpointError, "model = 'none' holds no checkpoint"),
        ({"model": {"image": {"encoder": "x"}}, "parts": CONNECTOR}, OptionError, "model: no language_model"),
        ({"model": {"encoder": "x"}, "parts": CONNECTOR}, OptionError, "model: unknown key 'encoder'"),
        (
            {"model": {"image": {"encoder": "/x"}, "language_model": "/y"}, "parts": CONNECTOR},
            CompositionError,
            "language_model = '/y'",
        ),
        ({"max_length": 5, "parts": CONNECTOR}, OptionError, "no row left of 12"),
        ({"overlong": "error", "max_length": 45, "parts": CONNECTOR}, ValueError, "has .* tokens"),
    ],
)
def test_bad_input_leaves_nothing_behind(train, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        train(tmp_path / "run", **options)
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "run"])


def test_missing_media_are_found_before_anything_is_assembled(train, tmp_path):
    rows = save_tiny_rows(tmp_path / "rows", 4)
    (tmp_path / "rows" / "images" / "1-0.png").unlink()
    with pytest.raises(MediaError, match="1-0.png"):
        train(tmp_path / "run", model=save_tiny_parts(tmp_path / "tiny"), data=[str(rows)], parts=CONNECTOR)
    assert not (tmp_path / "run").exists()


def test_somebody_elses_directory_is_left_alone(train, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match="such as thesis.tex"):
        train(tmp_path, model=save_tiny_parts(tmp_path.with_name("tiny")), parts=CONNECTOR)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_parts_are_assembled_once_and_a_second_stage_starts_from_the_first(train, tmp_path):
    parts = save_tiny_parts(tmp_path / "tiny")
    first = train(tmp_path / "first", model=parts, parts=LORA)
    stamp = (first / "assembled" / "model.safetensors").stat().st_mtime_ns
    train(first, model=parts, parts=LORA)
    assert (first / "assembled" / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(CheckpointError, match="was assembled from"):
        train(first, model=parts | {"seed": 7}, parts=LORA)

    second = train(tmp_path / "second", model=str(first / "final"), parts=CONNECTOR)
    base = load_file(second / "base" / "model.safetensors")
    expected = merged(load_model(first / "final")).state_dict()
    assert all(torch.equal(base[name], expected[name]) for name in base)
    assert load_model(second / "final").generation_config.suppress_tokens


def test_the_program_ends_with_the_message_alone(tmp_path, monkeypatch, capsys):
    program = Path(__file__).parents[2] / "train" / "sft.py"
    config = tmp_path / "my.yaml"
    config.write_text(json.dumps({"model": "m", "data": ["none.jsonl"], "output_dir": str(tmp_path / "run")}))
    monkeypatch.setattr(sys, "argv", ["sft.py", "--config", str(config), "--use_cpu", "true"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(program), run_name="__main__")
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert "OptionError\nfound: data: " in shown and "Traceback" not in shown


def test_several_gpus_want_a_launcher(monkeypatch):
    options = {"model": "m", "data": ["a.jsonl"], "output_dir": "o", "use_cpu": True}
    arguments = build_arguments(options, where="here")
    check_launch(arguments)
    monkeypatch.setattr(SftArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(OptionError, match="2 visible GPUs and one process"):
        check_launch(arguments)


def _log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
