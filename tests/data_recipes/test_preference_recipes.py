"""Preference recipes on miniatures of the published files; one of them as a real process."""

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mllm.data.blobs import read_media_bytes
from mllm.data.indexing.index import open_index
from mllm.data.mixture_file import read_mixture
from mllm.data.schema import PreferenceRow, parse_row

ROOT = Path(__file__).parents[2]


def read_rows(out):
    fields = [json.loads(line) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [parse_row(row, where="rows.jsonl", root=out) for row in fields]
    assert all(isinstance(row, PreferenceRow) for row in rows)
    return rows


def picture(colour, kind="JPEG"):
    file = BytesIO()
    Image.new("RGB", (6, 4), colour).save(file, kind)
    return file.getvalue()


def rlaif_row(number, data, **changes):
    return {
        "ds_name": "RLAIF-V",
        "image": {"bytes": data, "path": f"{number}.jpg"},
        "question": "What is it?",
        "chosen": f"A bus {number}.",
        "rejected": "A dog.",
        "origin_dataset": "COCO",
        "origin_split": "{}",
        "idx": str(number),
        "image_path": f"{number}.jpg",
    } | changes


def test_rlaif_v_as_a_process(tmp_path):
    red, png = picture("red"), picture("blue", "PNG")
    rows = [rlaif_row(0, red), rlaif_row(1, red), rlaif_row(2, png), rlaif_row(3, png, chosen="A dog.")]
    (tmp_path / "RLAIF-V-Dataset").mkdir()
    for number in (0, 1):
        table = pa.Table.from_pylist(rows[2 * number : 2 * number + 2])
        pq.write_table(table, tmp_path / f"RLAIF-V-Dataset/RLAIF-V-Dataset_00{number}.parquet")
    out = tmp_path / "rows"
    command = [sys.executable, ROOT / "data_recipes/rlaif_v.py", "--annotations", tmp_path / "RLAIF-V-Dataset"]
    command += ["--out", out, "--revision", "abc123"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts == json.loads((out / "recipe.json").read_text())
    assert (facts["records"], facts["rows"], facts["bad"]) == (4, 3, 0)
    assert facts["dropped"] == {"both answers are the same": 1} and facts["media"] == {"image embedded": 3}
    assert facts["licence"] == "CC BY-NC 4.0" and facts["revision"] == "abc123"
    assert [entry["file"] for entry in facts["hashes"]] == [
        "RLAIF-V-Dataset_000.parquet",
        "RLAIF-V-Dataset_001.parquet",
    ]
    found = read_rows(out)
    assert [row.id for row in found] == ["0", "1", "2"]
    assert [row.media[0].path.read_bytes() for row in found] == [red, red, png]
    assert found[0].media == found[1].media and found[2].media[0].path.suffix == ".png"
    assert len(list((out / "embedded").rglob("*.*"))) == 2


def test_embedded_media_move_into_shards(tmp_path, convert):
    pq.write_table(pa.Table.from_pylist([rlaif_row(0, picture("red"))]), tmp_path / "RLAIF-V-Dataset_000.parquet")
    convert("rlaif_v", tmp_path / "RLAIF-V-Dataset_000.parquet", tmp_path / "rows", "--embed")
    left = {path.name for path in (tmp_path / "rows").iterdir()}
    assert left == {"complete.json", "mixture.yaml", "recipe.json", "shards"}
    (source,) = read_mixture({"mixture": str(tmp_path / "rows/mixture.yaml")}).sources
    (row,) = open_index(source, cache_dir=tmp_path / "cache")
    assert row.chosen.content == "A bus 0." and read_media_bytes(row.media[0]) == picture("red")


def test_rlhf_v(tmp_path, convert):
    said = {"question": "Describe it.", "chosen": "A bus.", "rejected": "A bus and a dog."}
    row = {
        "ds_name": "RLHF-V",
        "image": {"bytes": picture("red"), "path": "1.jpg"},
        "text": json.dumps(said),
        "origin_dataset": "LVIS",
        "origin_split": "{}",
        "idx": 5,
        "image_path": "1.jpg",
    }
    rows = [row, {**row, "text": "no JSON", "idx": 6}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "RLHF-V-Dataset.parquet")
    facts = convert("rlhf_v", tmp_path / "RLHF-V-Dataset.parquet", tmp_path / "rows", on_bad="quarantine")
    (found,) = read_rows(tmp_path / "rows")
    assert (found.chosen.content, found.rejected.content) == ("A bus.", "A bus and a dog.")
    assert (facts["rows"], facts["bad"]) == (1, 1)


def test_re_align(tmp_path, convert):
    def side(words, question="<image>\nWhat is it?"):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": words}]

    names = [f"COCO_train2014_{number:012d}.jpg" for number in range(2)]
    (tmp_path / "train2014").mkdir()
    for name in names:
        (tmp_path / "train2014" / name).write_bytes(picture("red"))
    good = {"image": names[0], "retrieved_image": names[1], "chosen": side("A bus."), "rejected": side("A dog.")}
    rows = [
        good,
        {**good, "retrieved_image": None},
        {**good, "rejected": side("A dog.", "<image>\nWho is it?")},
        {**good, "retrieved_image": "COCO_train2014_000000000009.jpg"},
    ]
    (tmp_path / "pref_data.json").write_text(json.dumps(rows))
    options = ("--media_root", tmp_path / "train2014", "--on_missing", "drop")
    facts = convert("re_align", tmp_path / "pref_data.json", tmp_path / "rows", *options, on_bad="quarantine")
    assert (facts["rows"], facts["bad"], facts["left_out"]) == (2, 1, {"no retrieved image": 1})
    assert facts["dropped"] == {"a media file is missing": 1} and facts["missing_media"] == {"COCO_train2014_": 1}
    first, second = read_rows(tmp_path / "rows")
    assert [item.path.name for item in first.contrast] == [names[1]] and second.contrast is None
    assert second.meta == {}


def test_vlfeedback(tmp_path, convert):
    def completion(words, *ratings):
        aspects = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
        notes = {aspect: {"Rating": rating, "Rationale": "."} for aspect, rating in zip(aspects, ratings, strict=True)}
        return {"annotations": notes, "model": "m", "response": words}

    answers = [
        completion("a", *"555"),
        completion("b", *"333"),
        completion("c", *"333"),
        completion("d", "1", "1", "N/A"),
    ]
    rows = [
        {"id": "one", "prompt": "What?", "models": [], "completions": answers, "img_path": "merged_images/1.jpg"},
        {"id": "two", "prompt": "What?", "models": [], "completions": answers[1:], "img_path": "merged_images/1.jpg"},
    ]
    path = tmp_path / "vlfeedback_80k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "merged_images").mkdir()
    (tmp_path / "merged_images/1.jpg").write_bytes(picture("red"))

    facts = convert("vlfeedback", path, tmp_path / "all")
    assert [row.id for row in read_rows(tmp_path / "all")] == ["one/0", "one/1"]
    assert facts["left_out"] == {"an answer without numeric ratings": 1, "a tie": 1}
    assert facts["dropped"] == {"no two answers of clearly different rating": 1}
    facts = convert("vlfeedback", path, tmp_path / "best", "--pairs", "best_worst", "--min_margin", "1.5")
    assert [(row.id, row.chosen.content) for row in read_rows(tmp_path / "best")] == [("one", "a")]
    assert facts["options"] == {"pairs": "best_worst", "min_margin": 1.5}
