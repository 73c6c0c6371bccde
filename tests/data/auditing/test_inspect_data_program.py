"""scripts/inspect_data.py on the digits world, on a LLaVA miniature and on a preference miniature."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mllm import load_processor
from mllm.data.examples import encode_row
from mllm.data.indexing.index import open_index
from mllm.data.indexing.token_counts import has_counts
from mllm.data.sources import Source

ROOT = Path(__file__).parents[3]


@pytest.fixture
def inspect(monkeypatch, capsys, tmp_path):
    """Run the program in this process: its exit status, and what it printed."""
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path / "cache"))
    main = runpy.run_path(str(ROOT / "scripts" / "inspect_data.py"))["main"]

    def run(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["inspect_data.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return end.value.code, printed.out + printed.err

    return run


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The digits world, small."""
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("digits") / "world"
    recipe = [sys.executable, "data_recipes/digits.py", "--out", out, "--seed", "0", "--scenes", "12"]
    small = ["--eval_scenes", "2", "--text_share", "0.001"]
    subprocess.run([*recipe, *small], cwd=ROOT, check=True, capture_output=True, timeout=120)
    return out


@pytest.fixture
def media(tmp_path) -> Path:
    folder = tmp_path / "images" / "coco"
    folder.mkdir(parents=True)
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    whole = (folder / "0.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return tmp_path / "images"


@pytest.fixture
def llava(tmp_path, media) -> Path:
    def row(name, question, answer, **more):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": name, "conversations": turns, **more}

    rows = [
        row(1, "<image>\nWhere is it?", "At [0.5, 0.5, 1.0, 1.0].", image="coco/0.jpg"),
        row("two", "<image>\n<image>\nWhich?", "The first.", image=["coco/1.jpg", "coco/2.jpg"]),
        row("text", "What does <image> mean?", "A tag."),
        row("gone", "<image>\nWhat?", "Nothing.", image="sam/1.jpg"),
        row("cut", "<image>\nWhat?", "Half of it.", image="coco/cut.jpg"),
        row("cut", "<image>\nWhat?", "Half of it.", image="coco/cut.jpg"),
    ]
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture
def preference(tmp_path, media) -> Path:
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    images = [{"kind": "image", "path": f"coco/{number}.jpg"} for number in range(3)]
    row = {
        "id": "pair",
        "messages": question,
        "media": images[:1],
        "chosen": {"content": "A kite."},
        "rejected": {"content": "A dog.", "media": images[1:2]},
        "contrast": images[2:],
    }
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path


def test_the_digits_world(inspect, digits, assembled, tmp_path):
    page, report = tmp_path / "page.html", tmp_path / "report.json"
    files = [digits / "caption.jsonl", digits / "text.jsonl"]
    status, said = inspect(
        "audit", "--data", *files, "--model", assembled, "--json", report, "--decode", "--html", page
    )
    assert status == 0 and "12 rows, 0 left out as broken" in said
    sources = json.loads(report.read_text())["sources"]
    assert [source["rows"] for source in sources][0] == 12
    assert [(media["items"], media["files"], media["refused"]) for media in sources[0]["media"]] == [(12, 12, {})]
    assert 0 < sources[0]["tokens"]["learned"] < sources[0]["tokens"]["total"]

    status, said = inspect("show", "--data", files[0], "--model", assembled, "--rows", "2", "--html", page)
    assert status == 0 and said.count("<image> x 4\n") == 2 and "[[" in said
    assert page.read_text().count('<section class="row">') == 2

    status, said = inspect(
        *("stats", "--data", *files, "--model", assembled, "--batch_size", "4", "--html", page, "--json", report)
    )
    found = json.loads(report.read_text())
    assert status == 0 and found["unit"] == "tokens" and found["sources"][0]["rows"] == 12
    assert sum(sum(batch["sources"].values()) for batch in found["batches"]) == found["rows"]
    assert page.read_text().count("data:image/png;base64,") == 2


def test_a_llava_miniature(inspect, llava, media, assembled, tmp_path):
    options = ["--data", llava, "--media_root", media, "--coordinates", "unit", "--model", assembled]
    report = tmp_path / "report.json"
    status, said = inspect("audit", *options, "--json", report, "--max_length", "40", "--decode")
    assert status == 1
    (source,) = json.loads(report.read_text())["sources"]
    assert (source["rows"], source["bad_rows"], source["coordinates"]) == (5, 1, 5)
    refused = {
        media["prefix"]: {kind: t["count"] for kind, t in media["refused"].items()} for media in source["media"]
    }
    assert refused == {"coco": {"truncated or damaged": 1}, "sam": {"missing": 1}}
    assert source["same_id"]["count"] == source["same_row"]["count"] == 1
    assert source["tokens"]["overlong"]["count"] >= 1
    for words in ("1 file missing, under sam", "no licence stated", "row 'gone'"):
        assert words in said
    status, said = inspect("show", *options, "--id", "1", "text", "cut", "--html", tmp_path / "page.html")
    assert status == 0
    assert "[0.5, 0.5, 1.0, 0.83]" in said  # 40 x 60, padded to a square
    assert "What does <image> mean?" in said
    page = (tmp_path / "page.html").read_text()
    assert "truncated JPEG" in page and "boxes moved from unit" in page


def test_a_preference_miniature(inspect, preference, media, assembled, tmp_path):
    options = ["--data", preference, "--media_root", media]
    status, said = inspect("show", *options, "--model", assembled, "--html", tmp_path / "page.html")
    assert status == 0 and [f"[{side}]" in said for side in ("chosen", "rejected", "contrast")] == [True] * 3
    page = (tmp_path / "page.html").read_text()
    for words in ("Chosen: the better answer", "Rejected: the worse answer", "Contrast: under these media"):
        assert words in page
    assert inspect("audit", *options, "--licence", "MIT")[0] == 0
    status, said = inspect("stats", *options)
    assert status == 0 and '"unit": "words"' in said


def test_a_training_configuration(inspect, llava, media, assembled, tmp_path):
    config = tmp_path / "train.yaml"
    data = [{"path": llava.name, "media_root": "images", "licence": "CC BY 4.0"}]
    config.write_text(yaml.safe_dump({"model": str(assembled), "data": data, "max_length": 40}))
    status, said = inspect("audit", "--config", config)
    assert status == 1 and "licence: CC BY 4.0" in said and "longer than 40 tokens" in said


def test_counts_are_kept_for_training(inspect, llava, media, assembled):
    options = ["--data", llava, "--media_root", media]
    source = Source(llava, media_root=media, on_bad="quarantine", max_bad_rate=1.0)
    assert not has_counts(open_index(source), load_processor(assembled))
    status, said = inspect("count", *options, "--model", assembled)
    index, processor = open_index(source), load_processor(assembled)
    assert status == 0 and has_counts(index, processor)
    tokens = sum(len(encode_row(row, processor).input_ids) for row in index)
    assert f"{len(index):,} rows, {tokens:,} tokens" in said
    status, said = inspect("count", *options)
    assert status == 2 and "no --model" in said


def test_an_audit_looks_at_the_rows_that_are_taken(inspect, llava, media, tmp_path):
    mixture, report = tmp_path / "mixture.yaml", tmp_path / "report.json"
    sources = [{"path": llava.name, "media_root": "images", "take": "end:2"}]
    mixture.write_text(yaml.safe_dump({"sources": sources}))
    inspect("audit", "--mixture", mixture, "--json", report)
    (source,) = json.loads(report.read_text())["sources"]
    assert (source["rows"], source["looked_at"], source["same_id"]["count"]) == (5, 2, 1)
    inspect("audit", "--mixture", mixture, "--json", report, "--max_rows", "1")
    assert json.loads(report.read_text())["sources"][0]["looked_at"] == 1


def test_a_source_without_a_usable_row_is_audited(inspect, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"id": 1, "messages": []}\n')
    status, said = inspect("audit", "--data", tmp_path / "rows.jsonl", "--format", "mllm")
    assert status == 1 and "rows that cannot be used: 1 (100.00%)" in said


def test_a_bare_tokenizer_counts_images_as_llava_does(inspect, llava, media, assembled, tmp_path):
    language_model = assembled.parent / "llm"
    status, said = inspect("show", "--data", llava, "--media_root", media, "--model", language_model, "--id", "two")
    assert status == 0 and said.count("<image> x 576") == 3  # two, and the legend


def test_without_a_tokenizer_there_are_texts(inspect, llava, media):
    status, said = inspect("show", "--data", llava, "--media_root", media, "--id", "two", "--colour", "always")
    assert status == 0 and "The first." in said and "without a tokenizer" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "not one of --data, --mixture and --config"),
        (("--data", "nowhere.json"), "nowhere.json is not there"),
        (("--data", "LLAVA", "--id", "nobody"), "no row with the id 'nobody'"),
        (("--data", "LLAVA", "--model", "nowhere"), "neither a processor of ours nor a tokenizer"),
        (("--data", "LLAVA", "--format", "parchment"), "parchment"),
    ],
)
def test_mistakes_are_explained(inspect, llava, arguments, message):
    status, said = inspect("show", *(llava if argument == "LLAVA" else argument for argument in arguments))
    assert status == 2 and message in said and "do this:" in said
