"""Probes: synthetic ones, and ones out of a row file."""

import json

import pytest

from mllm import load_processor
from mllm.errors import MediaError, OptionError
from mllm.export.probes import probe_inputs, probes_from_rows, synthetic_probes
from mllm.processing.images import decode_image
from mllm.testing import save_tiny_rows


def test_rows_become_prompts_without_the_answer(tmp_path):
    path = save_tiny_rows(tmp_path, 4, num_images=lambda number: number % 3)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    probes = probes_from_rows(path, limit=3)
    assert [probe.name for probe in probes] == ["row-0", "row-1", "row-2"]
    for probe, row in zip(probes, rows, strict=False):
        assert probe.messages == row["messages"][:-1]
        assert probe.images == [decode_image(tmp_path / item["path"]) for item in row["media"]]
    assert len(probes_from_rows(path, limit=99)) == 4


def test_only_what_precedes_the_last_answer_is_kept(tmp_path, assembled):
    save_tiny_rows(tmp_path, 2)
    path = tmp_path / "rows.jsonl"
    media = json.loads(path.read_text(encoding="utf-8").splitlines()[1])["media"]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A digit.", "loss": False},
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": "Seven."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And here?"}]},
    ]
    path.write_text(json.dumps({"id": 5, "messages": messages, "media": media * 2}) + "\n", encoding="utf-8")
    (probe,) = probes_from_rows(path, limit=1)
    assert [message["role"] for message in probe.messages] == ["system", "user", "assistant", "user"]
    assert all(message.keys() == {"role", "content"} for message in probe.messages)
    assert probe.messages[-1]["content"] == [{"type": "text", "text": "Which?"}]
    assert len(probe.images) == 1
    inputs = probe_inputs(load_processor(assembled), probe)
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)


def test_rows_that_cannot_be_used(tmp_path):
    path = save_tiny_rows(tmp_path, 2)
    with pytest.raises(OptionError, match="is not there"):
        probes_from_rows(tmp_path / "others.jsonl", limit=1)
    with pytest.raises(OptionError, match="0 rows to compare"):
        probes_from_rows(path, limit=0)
    (tmp_path / "images" / "1-0.png").unlink()
    with pytest.raises(MediaError, match="row 'row-1' .* does not exist"):
        probes_from_rows(path, limit=2)


def test_synthetic_probes_ask_with_and_without_images():
    probes = synthetic_probes(16)
    assert {len(probe.images) for probe in probes} == {0, 1, 2}
    assert any(image.width != image.height for probe in probes for image in probe.images)
    for probe in probes:
        items = [item for message in probe.messages for item in message["content"]]
        assert sum(item["type"] == "image" for item in items) == len(probe.images)
