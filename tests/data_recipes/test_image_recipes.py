"""LLaVA's and ShareGPT4V's recipes on miniatures of the published files."""

import hashlib
import json

import pytest
import yaml
from PIL import Image

from mllm.data.indexing.index import open_index
from mllm.data.mixture_file import read_mixture
from mllm.errors import MediaError, OptionError, RowError

HUMAN, GPT = "human", "gpt"


def read_rows(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def talk(*values):
    return [{"from": (HUMAN, GPT)[number % 2], "value": value} for number, value in enumerate(values)]


def caption(name, words, question="<image>\nDescribe it."):
    return {"id": name.rpartition("/")[2].removesuffix(".jpg"), "image": name, "conversations": talk(question, words)}


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def save_images(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4)).save(root / name)
    return root


MIX = [
    {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": talk("<image>\nWhat colour is the bus?", "Red.", "Where is [0.1, 0.2, 0.3, 0.4]?", "There."),
    },
    {"id": 7, "model": "gpt4", "conversations": talk("What does <image> mean in HTML?", "A tag.")},
    {"id": "q1", "image": "ocr_vqa/images/1.jpg", "conversations": talk("Who wrote it?\n<image>", "Nobody.")},
    {"id": "q2", "image": "vg/VG_100K_2/2.jpg", "conversations": talk("What?", "That.")},  # no <image>
]


@pytest.fixture
def mix(tmp_path):
    save_images(tmp_path / "data", "coco/train2017/000000033471.jpg", "ocr_vqa/images/1.jpg", "vg/VG_100K_2/2.jpg")
    return write(tmp_path / "llava_v1_5_mix665k.json", MIX)


def test_llava_instruct(convert, mix, tmp_path):
    facts = convert("llava_instruct", mix, tmp_path / "rows", "--media_root", tmp_path / "data", on_bad="quarantine")
    rows = read_rows(tmp_path / "rows")
    assert [row["id"] for row in rows] == ["000000033471", "7", "q1"]
    assert rows[0]["messages"][0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "What colour is the bus?"},
    ]
    assert rows[1]["messages"][0]["content"] == "What does <image> mean in HTML?" and rows[1]["media"] == []
    assert rows[2]["media"] == [{"kind": "image", "path": "ocr_vqa/images/1.jpg"}]
    assert {row["source"] for row in rows} == {"llava_instruct"}
    assert {row["coordinates"] for row in rows} == {"padded_unit"}
    assert (facts["records"], facts["rows"], facts["bad"], facts["stated_rows"]) == (4, 3, 1, "665 K")
    assert facts["media"] == {"image coco/train2017/": 1, "image ocr_vqa/images/": 1}
    assert facts["hashes"] == [
        {
            "file": "llava_v1_5_mix665k.json",
            "bytes": mix.stat().st_size,
            "sha256": hashlib.sha256(mix.read_bytes()).hexdigest(),
        }
    ]
    bad = [json.loads(line) for line in (tmp_path / "rows/quarantine.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in bad] == ["q2"] and "0 strings <image>" in bad[0]["reason"]


def test_bad_records_are_an_error_and_leave_a_list_and_nothing_else(convert, mix, tmp_path):
    with pytest.raises(RowError, match=r"1 of 4 rows cannot be used"):
        convert("llava_instruct", mix, tmp_path / "rows", "--media_root", tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "data",
        "llava_v1_5_mix665k.json",
        "rows.quarantine.jsonl",
    ]


@pytest.mark.parametrize("on_missing", ["error", "drop", "keep"])
def test_media_that_are_not_there(convert, mix, tmp_path, on_missing):
    write(mix, MIX[:3])
    (tmp_path / "data/ocr_vqa/images/1.jpg").unlink()
    options = ("--media_root", tmp_path / "data", "--on_missing", on_missing)
    if on_missing == "error":
        with pytest.raises(MediaError, match="ocr_vqa/images/1.jpg: the file is not there"):
            convert("llava_instruct", mix, tmp_path / "rows", *options)
        return
    facts = convert("llava_instruct", mix, tmp_path / "rows", *options)
    if on_missing == "keep":
        assert facts["rows"] == 3 and facts["missing_media"] == {}
        return
    assert facts["rows"] == 2 and facts["dropped"] == {"a media file is missing": 1}
    assert facts["missing_media"] == {"ocr_vqa/images/": 1}
    assert (tmp_path / "rows/missing.txt").read_text() == "ocr_vqa/images/1.jpg\n"


def test_a_path_that_leaves_the_media_root_is_bad_even_where_nobody_looks(convert, mix, tmp_path):
    write(mix, [*MIX[:3], {"id": "x", "image": "../secret.jpg", "conversations": talk("<image>\nWhat?", "That.")}])
    options = ("--media_root", tmp_path / "data", "--on_missing", "keep")
    facts = convert("llava_instruct", mix, tmp_path / "rows", *options, on_bad="quarantine")
    assert (facts["rows"], facts["bad"]) == (3, 1)
    assert "outside the media root" in (tmp_path / "rows/quarantine.jsonl").read_text()


def test_remapped_media_and_the_mixture_that_finds_them(convert, recipe_of, mix, tmp_path):
    write(mix, MIX[:3])
    (tmp_path / "data/coco").rename(tmp_path / "elsewhere")
    remap = ("--media_root", tmp_path / "data", "--remap", f"coco={tmp_path / 'elsewhere'}", "--limit", "1")
    facts = convert("llava_instruct", mix, tmp_path / "rows", *remap)
    assert (facts["rows"], facts["limit"]) == (1, 1)
    mixture = yaml.safe_load((tmp_path / "rows/mixture.yaml").read_text())
    (source,) = read_mixture(mixture, root=tmp_path / "rows").sources
    assert source.path == tmp_path / "rows" / "rows.jsonl" and source.name == "llava_instruct"
    assert source.media_root == tmp_path / "data" and source.remap == {"coco": str(tmp_path / "elsewhere")}
    assert source.licence == recipe_of("llava_instruct").licence


@pytest.mark.parametrize("embed", [False, True])
def test_the_index_reads_what_a_recipe_writes(convert, mix, tmp_path, embed):
    write(mix, MIX[:3])
    options = ("--media_root", tmp_path / "data", *(["--embed"] if embed else []))
    convert("llava_instruct", mix, tmp_path / "rows", *options)
    assert (tmp_path / "rows/rows.jsonl").exists() != embed
    if embed:
        (tmp_path / "data").rename(tmp_path / "gone")
    (source,) = read_mixture({"mixture": str(tmp_path / "rows/mixture.yaml")}).sources
    index = open_index(source, cache_dir=tmp_path / "cache")
    assert [row.id for row in index] == ["000000033471", "7", "q1"]
    assert [(item.height, item.width) for row in index for item in row.media] == [(4, 6), (4, 6)]
    assert index[0].source == "llava_instruct" and index[0].coordinates == "padded_unit"
    picture = (tmp_path / ("gone" if embed else "data") / "ocr_vqa/images/1.jpg").read_bytes()
    found = index.media_bytes_of(index[2].media[0])
    assert (found if embed else found.read_bytes()) == picture


def test_an_existing_directory_and_a_file_without_a_row(convert, mix, tmp_path):
    (tmp_path / "rows").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        convert("llava_instruct", mix, tmp_path / "rows", on_bad="quarantine")
    write(mix, [])
    with pytest.raises(OptionError, match="no row of 0 records"):
        convert("llava_instruct", mix, tmp_path / "empty", on_bad="quarantine")
    with pytest.raises(OptionError, match="is not there"):
        convert("llava_instruct", tmp_path / "none.json", tmp_path / "empty", on_bad="quarantine")
    assert not (tmp_path / "empty").exists()


def test_llava_pretrain(convert, tmp_path):
    images = save_images(tmp_path / "images", "00453/004539375.jpg")
    record = caption("00453/004539375.jpg", "select luxury furniture", "Render a clear summary.\n<image>")
    path = write(tmp_path / "blip_laion_cc_sbu_558k.json", [record])
    facts = convert("llava_pretrain", path, tmp_path / "rows", "--media_root", images)
    (row,) = read_rows(tmp_path / "rows")
    assert row["messages"] == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Render a clear summary."}]},
        {"role": "assistant", "content": "select luxury furniture"},
    ]
    assert facts["rows"] == 1 and not row.get("coordinates")


CAPTIONS = [
    caption("coco/train2017/1.jpg", "long words on 1"),
    caption("coco/train2017/9.jpg", "long words on 9"),
    caption("llava/llava_pretrain/images/00/a.jpg", "long words on a"),
    caption("sam/images/sa_5.jpg", "long words on 5"),
    caption("wikiart/images/w.jpg", "long words on w"),
]


def test_sharegpt4v_captions(convert, tmp_path):
    path = write(tmp_path / "sharegpt4v_instruct_gpt4-vision_cap100k.json", CAPTIONS)
    options = ("--part", "captions", "--on_missing", "keep")
    facts = convert("sharegpt4v", path, tmp_path / "rows", *options)
    assert [row["source"] for row in read_rows(tmp_path / "rows")] == ["sharegpt4v/captions"] * 5
    assert facts["media"] == {
        "image coco/train2017/": 2,
        "image llava/llava_pretrain/images/": 1,
        "image sam/images/": 1,
        "image wikiart/images/": 1,
    }


DETAILS = [  # as in detail_23k.json, where images have no folder
    {"id": str(number), "image": f"{number}.jpg", "conversations": talk("<image>\nDetails?", f"short {number}")}
    for number in (1, 2, 3, 4)
]


def test_sharegpt4v_rebuilds_the_mix_from_its_parts(convert, tmp_path):
    in_mix = [{**row, "image": f"coco/train2017/{row['image']}"} for row in DETAILS]
    question = {"id": "1", "image": "coco/train2017/1.jpg", "conversations": talk("<image>\nHow many?", "Two.")}
    base = write(tmp_path / "mix.json", [in_mix[1], question, in_mix[0], MIX[1], in_mix[2], in_mix[3]])
    captions, details = write(tmp_path / "cap.json", CAPTIONS), write(tmp_path / "detail.json", DETAILS)
    options = ["--part", "rebuilt_sft", "--captions", captions, "--details", details, "--on_missing", "keep"]
    options += ["--quotas", "coco=1,lcs=1,sam=1"]

    facts = convert("sharegpt4v", base, tmp_path / "rows", *options)
    rows = read_rows(tmp_path / "rows")
    said = [row["messages"][-1]["content"] for row in rows]
    # Number 1 gets the caption of its own image, which comes before number 9 although only one of them is drawn; two
    # descriptions get the others; the last one finds none left. Rows that share an id with a description stay.
    assert said[1:4] == ["Two.", "long words on 1", "A tag."]
    assert {said[0], said[4]} == {"long words on a", "long words on 5"}
    assert said[5] == "short 4"
    assert facts["changes"] == {
        "captions drawn: coco": 1,
        "captions drawn: lcs": 1,
        "captions drawn: sam": 1,
        "captions drawn: rest": 0,
        "descriptions replaced by a caption of the same image": 1,
        "descriptions replaced by a caption of another image": 2,
        "descriptions kept: no caption left": 1,
        "captions not placed": 0,
    }
    convert("sharegpt4v", base, tmp_path / "again", *options)
    assert read_rows(tmp_path / "again") == rows
    for wrong in (["--part", "rebuilt_sft"], [*options, "--quotas", "moon=1"], [*options, "--quotas", "coco"]):
        with pytest.raises(OptionError, match="rebuilt_sft|quotas"):
            convert("sharegpt4v", base, tmp_path / "no", *wrong)
