"""The options of preference training: presets, what overrides them, and what is refused with a way out."""

import pytest

from mllm.data.contrasts import Contrast
from mllm.errors import OptionError
from mllm.training.arguments import build_arguments, parse_arguments
from mllm.training.preference_loss import LossOptions
from mllm.training.preference_options import PreferenceArguments

BASE = {"model": "m", "data": ["a.jsonl"], "output_dir": "o", "use_cpu": True}


def _arguments(**options) -> PreferenceArguments:
    return build_arguments(BASE | options, PreferenceArguments, where="here")


@pytest.mark.parametrize(
    ("preset", "contrast", "visual", "anchor", "is_unseen_needed"),
    [
        ("dpo", "none", 0.0, 0.0, False),
        ("rdpo", "retrieved", 1.0, 0.0, False),
        ("mdpo", "crop", 1.0, 1.0, False),
        ("vdpo", "none", 0.0, 0.0, True),
    ],
)
def test_a_preset_says_what_is_compared(preset, contrast, visual, anchor, is_unseen_needed):
    arguments = _arguments(preset=preset)
    assert arguments.sides == Contrast(contrast, seed=arguments.seed, is_unseen_needed=is_unseen_needed)
    loss = arguments.loss
    assert (loss.visual_weight, loss.anchor_weight, bool(loss.guidance)) == (visual, anchor, is_unseen_needed)
    assert loss.text == (("sigmoid", 1.0),) and loss.beta == 0.1


def test_rdpo_is_the_default():
    assert _arguments().preset == "rdpo" and _arguments().sides.media == "retrieved"


def test_what_is_said_overrides_the_preset():
    arguments = _arguments(
        preset="rdpo", contrast="crop", visual_weight=0.5, anchor_weight=0.25, beta=0.2, crop_scale=[0.1, 0.5],
        loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1], seed=5,
    )  # fmt: skip
    assert arguments.sides == Contrast("crop", crop_scale=(0.1, 0.5), seed=5)
    text = (("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0))
    assert arguments.loss == LossOptions(beta=0.2, text=text, visual_weight=0.5, anchor_weight=0.25)


def test_numbers_may_be_written_as_yaml_reads_them_not(tmp_path):
    """1e-1 is a word to YAML."""
    (tmp_path / "mine.yaml").write_text("model: m\ndata: [a.jsonl]\noutput_dir: o\nuse_cpu: true\nbeta: 5e-2\n")
    argv = ["--config", str(tmp_path / "mine.yaml"), "--visual_weight", "5e-1"]
    arguments = parse_arguments(argv, PreferenceArguments)
    assert (arguments.loss.beta, arguments.loss.visual_weight) == (0.05, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "ppo"}, r"preset = 'ppo'.*\nexpected: one of dpo, mdpo, rdpo, vdpo"),
        ({"loss_type": "kto"}, r"loss_type = 'kto'\nexpected: some of sigmoid, hinge"),
        ({"loss_type": ["sigmoid", "sigmoid"]}, "each once"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1]}, r"loss_weights = \[1\].*\nexpected: 2 numbers"),
        ({"loss_type": ["sigmoid"], "loss_weights": [-1]}, "loss_weights"),
        ({"preset": "dpo", "loss_weights": [0]}, "no other term"),
        ({"beta": 0}, "beta = 0 in here\nexpected: a number, above 0"),
        ({"beta": "much"}, "beta = 'much'"),
        ({"beta": True}, "beta = True"),
        ({"beta": float("nan")}, "beta = nan"),
        ({"label_smoothing": 0.1}, "loss_type: robust"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "below 0.5"),
        ({"visual_weight": -1}, "visual_weight = -1"),
        ({"visual_weight": 0}, "contrast = 'retrieved' and visual_weight = 0"),
        ({"preset": "dpo", "visual_weight": 1.0}, "contrast = 'none' and visual_weight = 1"),
        ({"contrast": "flip"}, "contrast = 'flip'"),
        ({"contrast": "crop", "crop_scale": [0.5, 0.1]}, r"crop_scale = \[0.5, 0.1\]"),
        ({"contrast": "crop", "crop_scale": 0.5}, "crop_scale = 0.5"),
        ({"crop_scale": [0.1, 0.5]}, "nothing is cropped"),
        ({"preset": "mdpo", "feature_cache": "cache"}, "cropped or blanked"),
        ({"preset": "vdpo", "feature_cache": "cache"}, "cropped or blanked"),
        ({"reference_cache": "there"}, "precompute_ref_log_probs: true"),
        ({"preset": "dpo", "released_log_probs": True}, "released_log_probs and preset = 'dpo'"),
        ({"released_log_probs": "yes"}, "true or false"),
        ({"disable_dropout": 1}, "true or false"),
        ({"prest": "dpo"}, r"unknown option 'prest'.*\nexpected: .*train/rdpo.py --help.*\ndo this: write `preset`"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(OptionError, match=message):
        _arguments(**options)


def test_help_shows_our_options_first(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"], PreferenceArguments)
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("usage: train/rdpo.py") and "--preset" in shown and "not TRL's `robust` loss" in shown
