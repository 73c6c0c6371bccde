"""docs/preference.md says what the code does: its tables are the code's, its examples parse, its sums come out."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml

from mllm.data.importers import IMPORTERS
from mllm.data.schema import PreferenceRow, parse_row
from mllm.errors import OptionError
from mllm.models.stock_parts import STOCK_PARTS
from mllm.models.supervised import SHARES_IMAGES
from mllm.training.arguments import build_arguments
from mllm.training.plan import PROGRAMS
from mllm.training.preference_loss import TEXT_LOSSES, LossOptions, preference_loss
from mllm.training.preference_meter import PreferenceMeter
from mllm.training.preference_options import PREFERENCE, PRESETS, PreferenceArguments

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "preference.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^##+ ([^\n]+)\n(.*?)(?=^##+ |\Z)", DOC, re.MULTILINE | re.DOTALL))
POLICY = {"chosen": -40.0, "rejected": -55.0, "contrast": -41.0}
REFERENCE = {"chosen": -42.0, "rejected": -50.0, "contrast": -42.5}
NEEDED = {"model": "somewhere", "data": ["rows.jsonl"], "use_cpu": True}
MISTAKES = (
    {"preset": "dpo", "visual_weight": 1.0},
    {"label_smoothing": 0.1},
    {"preset": "dpo", "released_log_probs": True},
    {"preset": "mdpo", "feature_cache": "features"},
)


def table(section: str) -> list[list[str]]:
    """The cells of a section's tables, heads and rules left out."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines if line.startswith("| `")]


def test_presets_are_those_of_the_options():
    rows = [row for row in table("What is compared") if row[0].strip("`") in PRESETS]
    columns = ("contrast", "visual_weight", "anchor_weight", "guidance")
    written = {row[0].strip("`"): dict(zip(columns, map(yaml.safe_load, row[1:5]), strict=True)) for row in rows}
    assert written == PRESETS


def test_options_and_their_defaults_are_those_of_the_program():
    defaults = {field.name: field for field in dataclasses.fields(PreferenceArguments)}
    described = []
    for names, default, _ in table("Options"):
        for name in re.findall(r"`(\w+)`", names):
            described.append(name)
            field = defaults[name]
            made = field.default_factory() if field.default is dataclasses.MISSING else field.default
            assert yaml.safe_load(default) == made, name
    assert sorted(described) == sorted(PREFERENCE)


def test_text_losses_are_those_of_the_code():
    assert [row[0].strip("`") for row in table("Text losses")] == list(TEXT_LOSSES)


def test_log_keys_are_those_of_the_meter():
    found, lengths = preference_loss(*worked_example(LossOptions(visual_weight=1.0))), torch.ones(1, dtype=torch.long)
    meter = PreferenceMeter()
    meter.add(found, as_tensors(POLICY), as_tensors(REFERENCE), dict.fromkeys(POLICY, lengths))
    written = {key for row in table("Reading the log") for key in re.findall(r"`([^`]+)`", row[0])}
    patterns = [re.compile(re.sub("NAME|SIDE", r"\\w+", key)) for key in written]
    assert [key for key in meter.read() if not any(pattern.fullmatch(key) for pattern in patterns)] == []


def test_worked_example_comes_out():
    found = preference_loss(*worked_example(LossOptions(visual_weight=1.0)))
    written = " ".join(SECTIONS["What is compared"].split("**Worked example**")[1].split("\n\n")[0].split())
    said = [float(number) for number in re.findall(r"-?\d+\.?\d*", written)]
    assert said[:7] == [0.1, *POLICY.values(), *REFERENCE.values()]
    rewards, margin, (text, visual_margin, visual, both) = said[7:10], said[12], said[14:18]
    assert rewards == pytest.approx([float(value) for value in found.rewards.values()])
    assert margin == pytest.approx(rewards[0] - rewards[1]) and visual_margin == pytest.approx(rewards[0] - rewards[2])
    assert (text, visual) == pytest.approx([float(value) for value in found.terms.values()], abs=5e-4)
    assert both == pytest.approx(float(found.losses), abs=1e-3)


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL))
def test_examples_parse(block, tmp_path):
    options = yaml.safe_load(block)
    stages = options.get("stages", [options])
    for stage in stages:
        kind = PROGRAMS[stage.get("program", "sft")] if "stages" in options else PreferenceArguments
        own = {key: value for key, value in stage.items() if key not in ("name", "program")}
        arguments = build_arguments(NEEDED | {"output_dir": str(tmp_path)} | own, kind, where="docs/preference.md")
        assert own.get("learning_rate") in (None, arguments.learning_rate)


@pytest.mark.parametrize("block", re.findall(r"```json\n(.*?)```", DOC, re.DOTALL))
def test_rows_parse(block, tmp_path):
    assert isinstance(parse_row(yaml.safe_load(block), where="docs/preference.md", root=tmp_path), PreferenceRow)


@pytest.mark.parametrize("options", MISTAKES, ids=list)
def test_messages_are_those_of_the_program(options, tmp_path):
    settled = NEEDED | {"output_dir": str(tmp_path)} | options
    with pytest.raises(OptionError) as raised:
        build_arguments(settled, PreferenceArguments, where="mine.yaml")
    assert f"| {raised.value.found} | " in SECTIONS["When something is wrong"]


def test_stock_models_that_share_pictures_are_named():
    names = {"llava": "LLaVA", "llava_next": "LLaVA-NeXT", "llava_onevision": "LLaVA-OneVision", "gemma3": "Gemma 3"}
    names |= {"qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
    (sentence,) = re.findall(r"so do these stock ones: ([^;]+);", " ".join(DOC.split()))
    assert set(sentence.split(", ")) == {names[model] for model in SHARES_IMAGES if model in STOCK_PARTS}


def test_forms_are_those_of_the_importers():
    forms = {"TRL": "preference_trl", "Re-Align": "re_align", "RLHF-V": "rlhf_v", "RLAIF-V": "rlaif_v"}
    forms |= {"VLFeedback": "vlfeedback", "MPO": "mpo", "mDPO": "mdpo"}
    (sentence,) = re.findall(r"seven published forms as they are \(([^;]+);", " ".join(DOC.split()))
    assert sentence.split(", ") == list(forms) and set(forms.values()) <= set(IMPORTERS)


def worked_example(options: LossOptions) -> tuple:
    """The arguments of `preference_loss` for the numbers that the document works out."""
    lengths = dict.fromkeys(POLICY, torch.ones(1, dtype=torch.long))
    return as_tensors(POLICY), as_tensors(REFERENCE), lengths, options


def as_tensors(sides: dict[str, float]) -> dict[str, torch.Tensor]:
    return {side: torch.tensor([value], dtype=torch.float64) for side, value in sides.items()}
