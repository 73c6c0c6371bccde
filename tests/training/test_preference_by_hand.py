"""What `train/rdpo.py` computes of rows against the formulas, with every side read alone by models in float64.

Nothing is shared, padded, packed or skipped here: one conversation at a time with its own pictures, and logits of all
its tokens. And which part of a row each term of the loss looks at.
"""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

from mllm import load_model, load_processor
from mllm.data.blobs import read_media_bytes
from mllm.data.collate import decode_item
from mllm.data.contrasts import Contrast, changed_data, shown_by
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.data.pairs import encode_pair, names_of_sides
from mllm.training.preference_options import PRESETS

PACKED = {"batching": "packed", "pack_length": 4096, "per_device_train_batch_size": None}
BETA = 0.1


@pytest.fixture(scope="module")
def other(assembled, tmp_path_factory) -> Path:
    """A model that is to be the reference, and says something else than the one that is trained."""
    directory = tmp_path_factory.mktemp("other")
    model = load_model(assembled)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    load_processor(assembled).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def first_line(prefer, other, tmp_path_factory):
    """The log's line about the first step, which all eight rows are in, before anything is learned."""
    lines: dict[str, dict[str, float]] = {}

    def start(**options) -> dict[str, float]:
        if str(options) in lines:
            return lines[str(options)]
        output_dir = tmp_path_factory.mktemp("run")
        settled = {"per_device_train_batch_size": 8, "max_steps": 1, "reference": str(other), "beta": BETA}
        prefer(output_dir, **(settled | options))
        return lines.setdefault(str(options), json.loads((output_dir / "log.jsonl").read_text().splitlines()[0]))

    return start


@cache
@torch.no_grad()
def _said_by_hand(checkpoint: Path, rows: Path, contrast: Contrast) -> dict[str, torch.Tensor]:
    """Log-probabilities of the answers, summed, of each side of all rows."""
    model, processor = load_model(checkpoint).double().eval(), load_processor(checkpoint)
    said: dict[str, list[float]] = {name: [] for name in names_of_sides(contrast)}
    for row in open_mixture(read_mixture([str(rows)])):
        for name, side in zip(said, encode_pair(row, processor, contrast).sides, strict=True):
            media = []
            for shown in shown_by(row, name, contrast):
                medium = decode_item(shown.item, read_media_bytes(shown.item), processor, where="here")
                media.append(medium._replace(data=changed_data(medium.data, shown, contrast.crop_scale)))
            inputs = {
                key: value.double() if value.is_floating_point() else value
                for key, value in processor.encode_media(media).items()
            }
            ids = torch.tensor(side.input_ids, dtype=torch.long)[None]
            log_probs = model(input_ids=ids, **inputs).logits.log_softmax(-1)[0]
            places = [place for place, label in enumerate(side.labels) if label != -100]
            said[name].append(sum(float(log_probs[place - 1, side.labels[place]]) for place in places))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in said.items()}


def _by_hand(policy: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], preset: str) -> dict[str, float]:
    """The terms of a preset, means over the rows."""
    log_sigmoid = torch.nn.functional.logsigmoid
    delta = {name: policy[name] - reference[name] for name in policy}
    good, bad = delta["chosen"], delta["rejected"]
    if preset == "vdpo":
        gamma = 1 + PRESETS[preset]["guidance"]
        good, bad = (
            gamma * policy[name] - (gamma - 1) * policy[f"{name}_unseen"] - reference[name]
            for name in ("chosen", "rejected")
        )
    terms = {"sigmoid": -log_sigmoid(BETA * (good - bad))}
    if preset in ("rdpo", "mdpo"):
        terms["visual"] = -log_sigmoid(BETA * (delta["chosen"] - delta["contrast"]))
    if preset == "mdpo":
        terms["anchor"] = -log_sigmoid(BETA * delta["chosen"])
    return {name: float(values.mean()) for name, values in terms.items()}


@pytest.mark.parametrize(("preset", "batching"), [
    ("rdpo", {}),
    ("mdpo", PACKED),
    ("vdpo", {}),
    *(pytest.param(preset, batching, marks=pytest.mark.slow) for preset, batching in (
        ("dpo", {}), ("dpo", PACKED), ("rdpo", PACKED), ("mdpo", {}), ("vdpo", PACKED),
    )),
])  # fmt: skip
def test_a_run_computes_its_formula(first_line, assembled, other, pairs, preset, batching):
    kind, guidance = PRESETS[preset]["contrast"], PRESETS[preset]["guidance"]
    contrast = Contrast(media=kind, seed=42, is_unseen_needed=guidance > 0)
    policy, reference = (_said_by_hand(checkpoint, pairs, contrast) for checkpoint in (assembled, other))
    line, expected = first_line(preset=preset, seed=42, **batching), _by_hand(policy, reference, preset)
    assert line["loss"] == pytest.approx(sum(expected.values()), abs=1e-4)
    assert {name: line[f"loss_terms/{name}"] for name in expected} == pytest.approx(expected, abs=1e-4)
    for side in policy:
        assert line[f"log_probs/{side}"] == pytest.approx(float(policy[side].mean()), rel=1e-5)
        if not side.endswith("_unseen"):
            reward = BETA * float((policy[side] - reference[side]).mean())
            assert line[f"rewards/{side}"] == pytest.approx(reward, abs=1e-4)


def _copy_with_another_row(pairs: Path, directory: Path, what: str) -> Path:
    """The rows, of which one has another word in an answer, or another retrieved picture."""
    shutil.copytree(pairs.parent, directory)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    if what == "retrieved":
        path = directory / rows[3]["contrast"][0]["path"]
        Image.new("RGB", Image.open(path).size, (10, 220, 70)).save(path)
    else:
        rows[3][what]["content"] = rows[3][what]["content"].replace("There", "Here")
    (directory / pairs.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory / pairs.name


@pytest.mark.parametrize(("preset", "what", "changed"), [
    ("rdpo", "rejected", {"sigmoid"}),
    ("rdpo", "retrieved", {"visual"}),
    ("mdpo", "chosen", {"sigmoid", "visual", "anchor"}),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("rdpo", "chosen", {"sigmoid", "visual"}),
        ("mdpo", "retrieved", set()),
        ("dpo", "rejected", {"sigmoid"}),
        ("dpo", "retrieved", set()),
    )),
])  # fmt: skip
def test_each_term_looks_at_its_part_of_a_row(first_line, pairs, tmp_path, preset, what, changed):
    """One word of one row's answer, or one row's retrieved picture."""
    before = first_line(preset=preset)
    after = first_line(preset=preset, data=[str(_copy_with_another_row(pairs, tmp_path / "rows", what))])
    terms = [name for name in before if name.startswith("loss_terms/")]
    moved = {name.removeprefix("loss_terms/") for name in terms if abs(before[name] - after[name]) > 1e-4}
    assert moved == changed
    assert (abs(before["loss"] - after["loss"]) > 1e-4) == bool(changed)
