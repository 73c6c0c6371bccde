"""The picture of a preference run: all branches of its log, and no reason to fail for."""

import json
import sys

import pytest

from mllm.training.preference_plot import PANELS, PICTURE, draw_preference, read_curves


def _log(directory, *lines: str) -> None:
    (directory / "log.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _drawn(monkeypatch, directory) -> dict[str, dict[str, tuple[list, list]]]:
    """Of each panel the curves by label."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    kept = []
    save = figure.savefig

    def savefig(self, *args, **kwargs):
        kept.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(figure, "savefig", savefig)
    assert draw_preference(directory)
    return {
        axes.get_title(): {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        for axes in kept[0].axes
    }


def test_a_run_leaves_a_picture_of_all_branches(prefer, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    prefer(tmp_path, preset="mdpo", max_steps=3, is_drawn=True)
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    panels = _drawn(monkeypatch, tmp_path)
    assert panels.keys() == PANELS.keys()
    loss, rewards, margins, accuracies, log_probs, kl = panels.values()
    assert loss.keys() == {"loss", "sigmoid", "visual", "anchor"}
    assert rewards.keys() == log_probs.keys() == {"chosen", "rejected", "contrast"}
    assert margins.keys() == accuracies.keys() == {"text", "visual"}
    assert kl["kl"] == ([1, 2, 3], [line["kl"] for line in lines if "kl" in line])
    assert margins["visual"][1] == [line["margins/visual"] for line in lines if "kl" in line]


def test_validation_is_drawn_beside_training(tmp_path, monkeypatch):
    _log(
        tmp_path, '{"step": 1, "loss": 2.0, "accuracies/text": 0.5}', '{"step": 2, "loss": 1.0, "accuracies/text": 1}',
        '{"step": 2, "eval/loss": 1.5, "eval/accuracies/text": 0.75}',
    )  # fmt: skip
    panels = list(_drawn(monkeypatch, tmp_path).values())
    assert panels[0] == {"loss": ([1, 2], [2.0, 1.0]), "loss, validation": ([2], [1.5])}
    assert panels[3] == {"text": ([1, 2], [0.5, 1]), "text, validation": ([2], [0.75])}


def test_a_log_of_a_run_that_was_killed_is_read_as_far_as_it_goes():
    lines = ['{"step": 1, "kl": 0.5, "note": "x"}', '{"step": 2, "kl": Infinity}', '{"step": 3, "kl": 0.']
    curves = read_curves(lines)
    assert curves.keys() == {"kl"} and list(curves["kl"]) == [1, 2] and curves["kl"][1] == 0.5
    assert curves["kl"][2] != curves["kl"][2]  # a gap


@pytest.mark.parametrize("has_log", [True, False])
def test_a_run_that_logged_no_step_still_has_a_picture(tmp_path, has_log):
    pytest.importorskip("matplotlib")
    if has_log:
        _log(tmp_path, '{"step": 3, "train_runtime": 1.0}')
    assert draw_preference(tmp_path) and (tmp_path / PICTURE).is_file()


def test_without_matplotlib_a_run_ends_well_and_says_so(prefer, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    prefer(tmp_path, preset="dpo", max_steps=1, is_drawn=True)
    assert (tmp_path / "final" / "complete.json").is_file() and not (tmp_path / PICTURE).exists()
    assert "matplotlib" in capsys.readouterr().out
