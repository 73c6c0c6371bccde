"""The quickstart: its steps fit the programs they call, and its report holds every kind of run to its figures."""

import importlib.util
import json
import runpy
from pathlib import Path

import pytest

from mllm.errors import CheckpointError, OptionError
from mllm.evaluation.digits import METRICS, TASKS, TASKS_OF
from mllm.evaluation.preference_report import BEFORE
from mllm.evaluation.quickstart_report import COMPARED, MEDIA_THRESHOLDS, THRESHOLDS, format_table, summarize
from mllm.pruning import build_pruner

ROOT = Path(__file__).parents[2]
BOTH = ("image", "image,audio,video")


PRUNED = {"accuracy": 0.9, "pruned": [{"pruner": "visiondrop tokens=1", "method": "visiondrop", "tokens": 1}]}
PRUNED["pruned"][0] |= {"seen": 1.0, "of": 9, "accuracy": 0.3, "kept": 0.33, "tasks": {}}
PREFERRED = {BEFORE: dict.fromkeys(COMPARED, 0.5), "rdpo": dict.fromkeys(COMPARED, 0.25)}


@pytest.fixture(scope="module")
def quickstart():
    return runpy.run_path(str(ROOT / "scripts" / "quickstart.py"))


@pytest.mark.parametrize("modalities", BOTH)
def test_every_step_calls_a_program_with_options_that_it_knows(quickstart, tmp_path, modalities):
    for name in quickstart["BUDGETS"][modalities]:
        _, program, *rest = quickstart["command"](name, tmp_path, 0, modalities)
        text = Path(program).read_text(encoding="utf-8")
        for option in (argument for argument in rest if argument.startswith("--")):
            # scripts/chat.py has a loop over the kinds of media.
            assert f'"{option}"' in text or (option == "--image" and 'f"--{kind}"' in text), (name, option)


@pytest.mark.parametrize("modalities", BOTH)
def test_steps_read_what_earlier_steps_write(quickstart, tmp_path, modalities):
    """Each directory in a command was the `--out` of a step before."""
    written = set()
    for name in quickstart["BUDGETS"][modalities]:
        _, _, *rest = quickstart["command"](name, tmp_path, 0, modalities)
        paths = [Path(word.split("=")[-1]) for word in rest if str(tmp_path) in word]
        out = {
            Path(rest[at + 1])
            for at, word in enumerate(rest)
            if word in ("--out", "--output_dir", "--html", "--picture")
        }
        for path in paths:
            if path not in out and path != tmp_path:
                assert written & {path, *path.parents}, (name, path)
        written |= out


def test_pictures_alone_need_nothing_of_the_rest(quickstart, tmp_path):
    steps = quickstart["BUDGETS"]["image"]
    assert list(steps) == ["data", "backbones", "train", "look", "evaluate", "prune", "prefer", "export", "chat"]
    words = " ".join(word for name in steps for word in quickstart["command"](name, tmp_path, 0, "image"))
    assert not {"videos", "sounds", "whisper", "lessons", "modalities"} & set(words.replace("/", " ").split())
    assert sum(steps.values()) <= 600 and sum(quickstart["BUDGETS"][BOTH[1]].values()) <= 900


def test_the_baselines_are_asked_for_with_every_budget(quickstart, tmp_path):
    _, _, *rest = quickstart["command"]("prune", tmp_path, 0, "image")
    specs = " ".join(rest[rest.index("--pruner") :]).split("--pruner ")[1:]
    pruners = [build_pruner(spec) for spec in specs]
    asked = {(type(pruner).__name__, pruner.tokens) for pruner in pruners}
    assert asked == {(name, tokens) for name in ("VisionDrop", "Random", "Uniform") for tokens in (1, 2, 3)}


def test_a_run_goes_on_only_as_it_began(quickstart, tmp_path):
    quickstart["read_steps"](tmp_path / "out", 0, "image")
    assert quickstart["read_steps"](tmp_path / "out", 0, "image") == {}
    with pytest.raises(CheckpointError, match="holds a quickstart with --modalities image"):
        quickstart["read_steps"](tmp_path / "out", 0, BOTH[1])
    with pytest.raises(CheckpointError, match="with seed 0"):
        quickstart["read_steps"](tmp_path / "out", 1, "image")


def test_a_missing_package_is_told_before_anything_runs(quickstart, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "av" else find(name, *rest))
    quickstart["check_packages"]("image")
    with pytest.raises(OptionError, match="without av"):
        quickstart["check_packages"](BOTH[1])


@pytest.mark.parametrize("modalities", BOTH)
def test_the_report_names_what_was_missed(quickstart, tmp_path, modalities):
    budget = quickstart["BUDGETS"][modalities]
    thresholds = THRESHOLDS if modalities == "image" else THRESHOLDS | MEDIA_THRESHOLDS
    tasks = TASKS if modalities == "image" else [task for group in TASKS_OF.values() for task in group]
    low = list(thresholds)[-1]
    evaluation = {
        task: {
            "model": {name: thresholds[name] - (0.01 if name == low else 0) for name in METRICS[task]},
            "baseline": dict.fromkeys(METRICS[task], 0.1),
            "items": 3,
        }
        for task in tasks
    }
    for part, text in (("backbones", "{}"), ("whisper", '{"parameters": 5}')):
        (tmp_path / part).mkdir()
        (tmp_path / part / "report.json").write_text(text)
    (tmp_path / "evaluation.json").write_text(json.dumps({"tasks": evaluation}))
    if modalities == "image":
        (tmp_path / "export").mkdir()
        fields = {"max_abs_diff": 0.0, "same_tokens": True, "num_probes": 1, "num_parameters": 2}
        (tmp_path / "export" / "export_report.json").write_text(json.dumps(fields))
        (tmp_path / "pruning.json").write_text(json.dumps(PRUNED | {"tasks": evaluation}))
        (tmp_path / "preference").mkdir()
        (tmp_path / "preference" / "report.json").write_text(json.dumps({"mean": PREFERRED}))
    # A step that was added later is done last.
    steps = {name: {"seconds": budget[name] - 1, "peak_bytes": 1} for name in reversed(budget)}
    report = summarize(tmp_path, seed=0, steps=steps, budget=budget)
    assert report["missed"] == [low]
    assert report["parameters"] == ({} if modalities == "image" else {"audio_encoder": 5})
    table = format_table(report)
    assert [line.split()[0] for line in table.splitlines()[1 : len(thresholds) + 1]] == list(thresholds)
    assert table.count("missed") == 1
    lines = [line.split() for line in table.splitlines()]
    if modalities == "image":
        assert ["visiondrop", "0.300", "0.900"] in lines and report["pruning"]["items"] == 3 * len(tasks)
        changes = [[line[-2], line[-1]] for line in lines if line[-2:] == ["0.500", "0.250"]]
        assert len(changes) == len(COMPARED) and report["preference"] == PREFERRED
    names, taken, allowed = (
        next(line for line in lines if line[-1:] == [end]) for end in ("seconds", "taken", "budget")
    )
    assert names[:-1] == [*budget, "total"]
    assert taken[:-1] == [str(value - 1) for value in (*budget.values(), sum(budget.values()) - len(budget) + 1)]
    assert allowed[:-1] == [*map(str, budget.values()), str(sum(budget.values()))]
