"""What the log says is what happened, and saying it changes nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mllm.errors import OptionError
from mllm.load import load_processor
from mllm.training.arguments import build_arguments
from mllm.training.callbacks import before_clipping, brief, part_norms

PARTS = {"image.connector": "full", "text": {"mode": "lora", "rank": 4}}
SHARES = ("padding_share", "data_wait_share")
FIGURES = ("tokens_per_second", "supervised_tokens_per_second", "images_per_second", "seconds_per_step")


@pytest.fixture(scope="module")
def run(train, tmp_path_factory) -> Path:
    """Three steps of four rows on one connector and adapters, a line for each, clipped hard, told to TensorBoard."""
    return train(
        tmp_path_factory.mktemp("logged") / "run",
        parts=PARTS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        logging_steps=1,
        max_grad_norm=0.01,
        report_to="tensorboard",
    )


def log_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_a_line_says_how_fast_how_full_and_how_large(run):
    lines = log_of(run)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert all(line[name] > 0 for name in (*FIGURES, "learning_rate", "peak_rss_gib", "epoch"))
        assert all(0 <= line[name] < 1 for name in SHARES)
        assert line["supervised_tokens_per_second"] < line["tokens_per_second"]


def test_counts_are_those_of_the_rows(run, assembled, rows):
    """One epoch of 12 rows in 3 steps: what was counted in all is what the rows hold."""
    processor = load_processor(assembled)
    given = [json.loads(line) for line in rows.read_text().splitlines()]
    tokens = supervised = images = 0
    for row in given:
        sizes = [(item["height"], item["width"]) for item in row.get("media", [])]
        chat = processor.encode_chat(row["messages"], media_sizes=sizes, where="the test")
        tokens += len(chat.input_ids)
        supervised += sum(weight > 0 for weight in chat.loss_weights[1:])
        images += len(sizes)
    lines = log_of(run)

    def total(name: str) -> float:
        return sum(line[name] * line["seconds_per_step"] for line in lines)

    assert total("tokens_per_second") == pytest.approx(tokens)
    assert total("supervised_tokens_per_second") == pytest.approx(supervised)
    assert total("images_per_second") == pytest.approx(images)


def test_norms_of_the_parts_make_up_the_norm_of_all_before_clipping(run):
    for line in log_of(run):
        parts = [line["grad_norm/image.connector"], line["grad_norm/text"]]
        assert min(parts) > 0 and line["grad_norm"] > 0.01
        assert sum(norm**2 for norm in parts) ** 0.5 == pytest.approx(line["grad_norm"], rel=1e-5)


def test_two_ranks_are_counted_together(train, two_ranks, run, tmp_path):
    two_ranks(train_on_two_ranks, train, tmp_path / "run")
    (line,) = log_of(tmp_path / "run")

    def total(lines: list[dict], name: str) -> float:
        return sum(line[name] * line["seconds_per_step"] for line in lines)

    for name in ("tokens_per_second", "supervised_tokens_per_second", "images_per_second"):
        assert total([line], name) * 3 == pytest.approx(total(log_of(run), name)), name


def train_on_two_ranks(train, output_dir: Path) -> None:
    train(output_dir, parts=PARTS, per_device_train_batch_size=2, max_steps=3, logging_steps=3)


def test_tensorboard_reads_the_same_figures(run):
    (directory,) = {path.parent for path in run.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(directory))
    events.Reload()
    for name in ("loss", "learning_rate", "grad_norm/text", *FIGURES, *SHARES):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert found == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in log_of(run)], name


def test_logging_changes_no_weight(train, tmp_path):
    often = train(tmp_path / "often", parts=PARTS, logging_steps=1, report_to="tensorboard")
    never = train(tmp_path / "never", parts=PARTS, logging_strategy="no")
    assert len(log_of(often)) == 4 and not log_of(never)
    weights, others = (load_file(one / "final" / "adapter_model.safetensors") for one in (often, never))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize(
    ("service", "message"),
    [
        ("wandb", "report_to = 'wandb' in here, and wandb is not installed"),
        ("trackio", "trackio is not installed"),
        ("tensorbored", r"(?s)report_to = 'tensorbored' .*some of .*tensorboard"),
    ],
)
def test_a_service_that_is_not_there_is_named_before_anything_starts(service, message):
    with pytest.raises(OptionError, match=message):
        build_arguments({"model": "m", "data": ["a.jsonl"], "output_dir": "o", "report_to": service}, where="here")


def test_norms_by_part_take_both_groups_of_a_part_together():
    def parameter(*gradient: float) -> torch.nn.Parameter:
        made = torch.nn.Parameter(torch.zeros(len(gradient)))
        made.grad = torch.tensor(gradient)
        return made

    untouched = torch.nn.Parameter(torch.zeros(2))
    groups = [
        {"name": "text/decayed", "params": [parameter(3.0, 0.0), untouched]},
        {"name": "text/not decayed", "params": [parameter(4.0)]},
        {"name": "image.connector/decayed", "params": [parameter(12.0)]},
        {"name": "image.encoder/decayed", "params": [untouched]},
    ]
    assert {part: norm.item() for part, norm in part_norms(groups).items()} == {"text": 5.0, "image.connector": 12.0}


def test_clipping_is_undone_by_one_factor():
    clipped = {"a": torch.tensor(3.0), "b": torch.tensor(4.0)}
    assert before_clipping(clipped, 10.0) == {"grad_norm/a": 6.0, "grad_norm/b": 8.0}
    assert before_clipping({"a": torch.tensor(0.0)}, 0.0) == {"grad_norm/a": 0.0}
    assert before_clipping({}, 3.0) == {}


def test_the_bar_has_room_for_three_figures():
    logs = {"loss": 1.2345678, "learning_rate": 2e-4, "tokens_per_second": 5300.4, "padding_share": 0.1}
    assert brief(logs) == "loss=1.235, lr=0.0002, 5,300 tok/s"
    assert brief({"loss": 2.0}) == "loss=2"
