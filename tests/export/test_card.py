"""The model card: numbers of the comparison, what is known of parts and data, and a snippet that runs."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from PIL import Image

from mllm.export.card import read_parts, read_sources, write_card
from mllm.export.mappings import find_target
from mllm.export.native import write_stock
from mllm.export.report import CARD, ExportReport
from mllm.testing import tiny_model

REPORT = ExportReport(
    architecture="LlavaForConditionalGeneration",
    dtype="bfloat16",
    trained_dtype="float32",
    num_parameters=1_234_567,
    num_probes=4,
    max_abs_diff=0.00123,
    tolerance=0.0625,
    same_tokens=True,
    merge_max_abs_diff=2e-7,
    rounding_max_abs_diff=0.031,
    versions={"mllm": "0", "torch": "0", "transformers": "5.23.0"},
)


def test_card_states_the_comparison(tmp_path):
    write_card(tmp_path, tmp_path / "gone", REPORT, title="org/name")
    card = (tmp_path / CARD).read_text(encoding="utf-8")
    for fact in ("1,234,567", "differ by at most 0.00123 in bfloat16 (allowed: 0.0625)", "2e-07", "0.031", "5.23.0"):
        assert fact in card
    assert "Not recorded" in card
    header = yaml.safe_load(card.split("---")[1])
    assert header == {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["mllm"]}
    other = replace(REPORT, merge_max_abs_diff=None, same_tokens=False)
    write_card(tmp_path, tmp_path / "gone", other, title="org/name")
    assert "continuations are equal up to ties of the two best tokens" in (tmp_path / CARD).read_text(encoding="utf-8")
    assert "up to ties" not in card
    assert "merging" not in (tmp_path / CARD).read_text(encoding="utf-8")


def test_card_names_parts_and_data_of_every_stage(tmp_path):
    model, first, second = (tmp_path / name for name in ("model", "first", "second"))
    for directory in (model, first, second):
        directory.mkdir()
    parts = {
        "language_model": "/home/me/secret/vicuna",
        "image": {"encoder": "openai/clip-vit-large-patch14-336", "connector": "mlp"},
    }
    (model / "complete.json").write_text(json.dumps({"kind": "model", "assembled_from": parts}))
    captions = {"path": "/home/me/captions.jsonl", "rows": 558_128, "sha256": "0123456789abcdef"}
    chat = {"path": "/home/me/chat.jsonl", "rows": 7, "sha256": "fedcba9876543210"}
    for directory, parent, source in ((first, model, captions), (second, first, chat)):
        (directory / "run.json").write_text(json.dumps({"model": {"path": str(parent)}, "data": [source]}))
    assert read_parts(second) == {
        "language_model": "/home/me/secret/vicuna",
        "image.encoder": "openai/clip-vit-large-patch14-336",
        "image.connector": "mlp",
    }
    assert read_sources(second) == [chat, captions]
    write_card(tmp_path, second, REPORT, title="org/name")
    card = (tmp_path / CARD).read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["base_model"] == [parts["image"]["encoder"]]
    assert "| captions.jsonl | 558,128 | 0123456789ab |" in card
    assert "| chat.jsonl | 7 | fedcba987654 |" in card
    assert "| vicuna |" in card and "/home/me" not in card


@pytest.fixture(scope="module")
def snippet(tmp_path_factory) -> subprocess.CompletedProcess:
    """What the card's Python prints, run as a reader would: in a fresh process, in a directory with a picture."""
    root = tmp_path_factory.mktemp("reader")
    model, processor = tiny_model(tmp_path_factory.mktemp("tiny"))
    model.generation_config.max_length = None
    (root / "tiny").mkdir()
    write_stock(model, processor, root / "tiny", target=find_target(model, processor))
    write_card(root / "tiny", root / "gone", REPORT, title="tiny")
    Image.new("RGB", (30, 20), "red").save(root / "picture.png")
    (code,) = re.findall(r"```python\n(.*?)```", (root / "tiny" / CARD).read_text(encoding="utf-8"), flags=re.DOTALL)
    (root / "use.py").write_text(code + "\nimport sys\nprint('alone:', 'mllm' not in sys.modules)\n")
    return subprocess.run([sys.executable, "use.py"], cwd=root, capture_output=True, text=True, check=False)


def test_snippet_runs_without_mllm(snippet):
    assert snippet.returncode == 0, snippet.stderr
    answer, alone = snippet.stdout.rstrip("\n").rsplit("\n", 1)
    assert alone == "alone: True"
    assert answer.strip()


def test_card_tells_of_an_adapter_trained_over_4_bits(tmp_path):
    parts = {"image.encoder": {"quantize": None}, "text": {"mode": "lora", "quantize": "4bit"}}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "run.json").write_text(json.dumps({"options": {"parts": parts}}))
    write_card(tmp_path, tmp_path / "model", REPORT, title="org/name")
    assert "| adapter trained | over 4-bit weights of text; merged into" in (tmp_path / CARD).read_text(
        encoding="utf-8"
    )
