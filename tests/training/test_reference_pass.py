"""What a reference says of all pairs, asked before the run: the same as step by step, and asked no more than once."""

import json
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from mllm.assemble import assemble_checkpoint
from mllm.data import examples
from mllm.errors import CheckpointError, MediaError, OptionError, TrainingError
from mllm.testing import save_tiny_parts
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.testing_pairs import save_tiny_pairs
from mllm.training import reference_pass
from mllm.training.arguments import build_arguments
from mllm.training.preference_options import PreferenceArguments
from mllm.training.programs import Screen, claim, model_in_parts, starting_point

KNOWN = {"precompute_ref_log_probs": True, "per_device_eval_batch_size": 3}
PARTS = {"image.connector": "full", "text": {"mode": "lora", "rank": 4}}
ALL_PARTS = {"parts": {"image.encoder": "full", "image.connector": "full", "text": "full"}}
SLOW = pytest.mark.slow


@pytest.fixture
def rows(tmp_path) -> Path:
    """Eight pairs of this test's own, each with an image and a retrieved one."""
    return save_tiny_pairs(tmp_path / "rows")


@pytest.fixture
def asked(monkeypatch) -> Counter[str]:
    """How many pairs were shown to the reference before the first step, and how many models were loaded for that."""
    counts: Counter[str] = Counter()
    answer, loaded = reference_pass._answer, reference_pass._loaded

    def counted(reference, collated, *args):
        counts["pairs"] += len(collated.positions)
        return answer(reference, collated, *args)

    def noted(*args):
        counts["models"] += 1
        return loaded(*args)

    monkeypatch.setattr(reference_pass, "_answer", counted)
    monkeypatch.setattr(reference_pass, "_loaded", noted)
    return counts


@pytest.fixture
def ask(assembled, rows, tmp_path):
    """Do what `train/rdpo.py` does up to its first step; what was said is kept in one place by all runs of a test."""

    def start(output_dir: str, **options) -> reference_pass.KnownReference:
        settled = {
            "model": str(assembled),
            "data": [str(rows)],
            "parts": PARTS,
            "output_dir": str(tmp_path / output_dir),
            "reference_cache": str(tmp_path / "said"),
            "max_steps": 1,
            "use_cpu": True,
        }
        args = build_arguments(settled | KNOWN | options, PreferenceArguments, where="the test")
        screen = Screen(lambda line: None, is_shown=False)
        point = starting_point(args, screen)
        model, record = model_in_parts(args, point, screen), claim(args, point)
        return reference_pass.known_reference(args, point, model, features=None, record=record, screen=screen)

    return start


# --- the same -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "rdpo"},
        {"preset": "dpo", **ALL_PARTS},
        pytest.param(
            {"preset": "mdpo", "batching": "packed", "pack_length": 512, "per_device_train_batch_size": None},
            marks=SLOW,
        ),
        pytest.param({"preset": "vdpo"}, marks=SLOW),
        pytest.param({"preset": "rdpo", "released_log_probs": True}, marks=SLOW),
        pytest.param({"preset": "rdpo", "feature_cache": "features"}, marks=SLOW),
        pytest.param({"preset": "rdpo", "bf16": True}, marks=SLOW),
    ],
    ids=lambda options: "-".join(map(str, options.values()))[:20],
)
def test_precomputed_equals_live(prefer, rows, tmp_path, options):
    """Losses, rewards and margins, on the way to other weights; on held-out pairs, too."""
    held_out = save_tiny_pairs(tmp_path / "held_out", 5, side=24)
    options = options | {"data": [str(rows)], "eval_data": [str(held_out)], "eval_strategy": "steps", "eval_steps": 2}
    live = _log(prefer(tmp_path / "live", **options))
    known = _log(prefer(tmp_path / "known", **options, **KNOWN))
    steps = [line for line in live if "grad_norm" in line]
    compared = [name for name in steps[-1] if name.startswith(("loss", "rewards/", "margins/", "log_probs/"))]
    tolerance = 2e-2 if options.get("bf16") else 1e-4
    for one, other in zip(live, known, strict=True):
        for name in one.keys() & {*compared, "eval/loss"}:
            assert other[name] == pytest.approx(one[name], abs=tolerance), name
    assert {"loss", "rewards/chosen"} <= set(compared) and any("eval/loss" in line for line in live)
    assert steps[-1]["loss"] != pytest.approx(steps[0]["loss"], abs=1e-3), "nothing was learned, so nothing compared"


@SLOW
def test_a_stock_model_is_asked_like_ours(prefer, rows, tmp_path):
    options = {"model": str(save_stock_checkpoint(tmp_path / "llava", "llava")), "data": [str(rows)]}
    live, known = (_log(prefer(tmp_path / name, **options, **own)) for name, own in (("live", {}), ("known", KNOWN)))
    assert [line["loss"] for line in known if "loss" in line] == pytest.approx(
        [line["loss"] for line in live if "loss" in line], abs=1e-4
    )


@SLOW
def test_another_reference_is_asked_in_its_own_name(prefer, rows, assembled, tmp_path, asked):
    """An adapter of an earlier run, which is merged."""
    before = prefer(tmp_path / "before", preset="dpo", data=[str(rows)]) / "final"
    options = {"preset": "dpo", "data": [str(rows)], "reference": str(before)}
    live = _log(prefer(tmp_path / "live", **options))
    known = _log(prefer(tmp_path / "known", **options, **KNOWN))
    assert known[0]["loss"] == pytest.approx(live[0]["loss"], abs=1e-4) and asked["models"] == 1
    assert known[0]["loss"] != pytest.approx(torch.tensor(2.0).log().item(), abs=1e-3)


def test_the_model_is_as_before_and_no_other_is_loaded(ask, asked, monkeypatch):
    seen, inside = {}, reference_pass._asked

    @contextmanager
    def watched(args, base, model):
        seen["before"] = _state_of(model)
        with inside(args, base, model) as reference:
            yield reference
        seen["after"] = _state_of(model)

    monkeypatch.setattr(reference_pass, "_asked", watched)
    for number, options in enumerate([{}, ALL_PARTS | {"preset": "dpo"}]):
        ask(str(number), **options)
        (weights, rest), (weights_after, rest_after) = seen["before"], seen["after"]
        assert rest == rest_after
        assert [key for key in weights if not torch.equal(weights[key], weights_after[key])] == []
    assert asked == {"pairs": 16}


def _state_of(model) -> tuple[dict, list]:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return weights, [trained, [name for name, module in model.named_modules() if "forward" in vars(module)]]


# --- once ------------------------------------------------------------------------------------------------------------


def test_what_was_said_is_not_asked_again(ask, asked, rows, tmp_path):
    """Whatever else the run does, and wherever its rows lie."""
    first = ask("first")
    assert asked["pairs"] == 8
    shutil.copytree(rows.parent, tmp_path / "moved")
    other = {"seed": 7, "beta": 0.5, "learning_rate": 1e-3, "anchor_weight": 1.0, "per_device_eval_batch_size": 2}
    second = ask("second", **other, data=[str(tmp_path / "moved" / rows.name)])
    assert asked["pairs"] == 8
    assert [second.training(position) for position in range(8)] == [first.training(position) for position in range(8)]


def test_a_crop_is_another_one_with_another_seed(ask, asked):
    for seed in (1, 2):
        ask(str(seed), preset="mdpo", seed=seed)
    assert asked["pairs"] == 16


def _other_weights(rows: Path) -> dict:
    torch.manual_seed(1)
    return {"model": str(assemble_checkpoint(rows.parent / "model", **save_tiny_parts(rows.parent / "parts")))}


def _other_words(rows: Path) -> dict:
    rows.write_text(rows.read_text().replace("a red 3", "a blue 3"))
    return {}


def _other_picture(rows: Path) -> dict:
    """Under the same name, and of the same size."""
    path = rows.parent / "0-retrieved.png"
    Image.new("RGB", Image.open(path).size, (1, 2, 3)).save(path)
    return {}


@pytest.mark.parametrize(
    "change",
    [
        _other_weights,
        _other_words,
        _other_picture,
        lambda rows: {"preset": "dpo"},
        lambda rows: {"dtype": "bfloat16"},
        lambda rows: {"bf16": True},
        lambda rows: {"released_log_probs": True},
        lambda rows: {"data": [{"path": str(rows), "take": "first:7"}]},
    ],
    ids=["weights", "words", "picture", "sides", "dtype", "autocast", "formula", "rows"],
)
def test_what_decides_an_answer_is_part_of_its_key(ask, asked, rows, change):
    ask("first")
    ask("second", **change(rows))
    assert asked["pairs"] > 8


def test_an_interrupted_pass_goes_on(ask, asked, monkeypatch, tmp_path):
    """It loses what was asked of the piece in work, and ends as one that was not interrupted."""
    monkeypatch.setattr(reference_pass, "PAIRS_OF_A_PIECE", 3)
    answer = reference_pass._answer

    def interrupted(*args):
        if asked["pairs"] == 5:
            raise KeyboardInterrupt
        return answer(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reference_pass, "_answer", interrupted)
        ask("run", per_device_eval_batch_size=2)
    asked.clear()
    known = ask("run", per_device_eval_batch_size=2)
    assert asked["pairs"] == 5
    straight = ask("straight", per_device_eval_batch_size=2, reference_cache=str(tmp_path / "elsewhere"))
    assert asked["pairs"] == 5 + 8
    assert [known.training(place) for place in range(8)] == [straight.training(place) for place in range(8)]


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_damaged_piece_is_named(ask, tmp_path):
    ask("first")
    (piece,) = (tmp_path / "said").glob("*/piece-*.safetensors")
    piece.write_bytes(piece.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=piece.name):
        ask("second")
    piece.unlink()
    ask("third")


def test_a_pair_with_a_damaged_picture_is_left_out_once(prefer, rows, tmp_path, asked):
    """As in a run that asks step by step: it is listed, and counted when it is due."""
    path = rows.parent / "3-own.png"
    path.write_bytes(path.read_bytes()[:70])
    source = {"path": str(rows), "on_bad": "quarantine", "max_bad_rate": 0.5}
    run = prefer(tmp_path / "run", data=[source], num_train_epochs=1, max_steps=-1, **KNOWN)
    assert asked["pairs"] == 7
    record = json.loads((run / "final" / "run.json").read_text())
    assert sum(record["rows"]["left_out"].values()) == 1
    assert len((run / "quarantine.jsonl").read_text().splitlines()) == 1


def test_a_row_that_turns_out_to_be_none_is_no_hindrance(ask, asked, rows, monkeypatch):
    """Of a large mixture, whose rows are not looked at before they are due."""
    monkeypatch.setattr(examples, "ENCODED_AT_START", 2)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    del lines[3]["contrast"]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    known = ask("run", data=[{"path": str(rows), "on_bad": "quarantine", "max_bad_rate": 0.5}])
    assert asked["pairs"] == len(known.training) == 7


def test_a_damaged_picture_is_an_error_where_its_source_wants_that(ask, rows):
    path = rows.parent / "3-own.png"
    path.write_bytes(path.read_bytes()[:70])
    with pytest.raises(MediaError, match=path.name):
        ask("run", data=[{"path": str(rows), "on_bad": "error"}])


def test_what_was_not_said_is_missed_by_name():
    known = reference_pass.ReferenceLogProbs([4, 2], torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]))
    assert known(2) == [-3.0, -4.0]
    with pytest.raises(CheckpointError, match="row 3"):
        known(3)


def test_a_reference_that_says_nothing_is_named_with_the_row(ask, monkeypatch):
    by_side = reference_pass.by_side
    monkeypatch.setattr(reference_pass, "by_side", lambda *args: by_side(*args) * float("nan"))
    with pytest.raises(TrainingError, match="pairs.jsonl.*log-probabilities"):
        ask("run")


def test_no_memory_is_explained(ask, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")

    monkeypatch.setattr(reference_pass, "_answer", full)
    with pytest.raises(OptionError, match="per_device_eval_batch_size"):
        ask("run")


def _log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
