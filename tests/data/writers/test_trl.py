import pytest
from PIL import Image

from mllm.data.schema import Answer, MediaItem
from mllm.data.writers.trl import write_trl
from mllm.errors import RowError

datasets = pytest.importorskip("datasets")

ASK = [{"type": "image"}, {"type": "text", "text": "What?"}]


def _load(path, tmp_path):
    return datasets.load_dataset("parquet", data_dir=str(path), split="train", cache_dir=str(tmp_path / "hf"))


@pytest.mark.parametrize("embed", [True, False])
def test_datasets_loads_messages_and_images(embed, make_row, images, tmp_path):
    rows = [make_row("No picture.", id="text"), make_row(ASK, media=images[:1], id="one")]
    write_trl(rows, tmp_path / "out", embed=embed)
    loaded = _load(tmp_path / "out", tmp_path)
    assert loaded.features["images"] == datasets.List(datasets.Image())
    text, one = loaded
    assert text["images"] == [] and text["messages"][0]["content"] == [{"type": "text", "text": "No picture."}]
    # What TRL's collator counts: parts of the type image, and images.
    parts = [part["type"] for message in one["messages"] for part in message["content"]]
    assert parts.count("image") == len(one["images"]) == 1
    assert [message["role"] for message in one["messages"]] == ["user", "assistant"]
    assert one["images"][0].tobytes() == Image.open(images[0].path).tobytes()


def test_datasets_loads_pairs(make_row, images, tmp_path):
    row = make_row(ASK, media=images[:1], chosen=Answer("A cat."), rejected=Answer("A dog."))
    write_trl([row], tmp_path / "out")
    (pair,) = _load(tmp_path / "out", tmp_path)
    assert {"prompt", "chosen", "rejected", "images"} <= pair.keys() and "messages" not in pair
    assert [part["type"] for part in pair["prompt"][0]["content"]] == ["image", "text"]
    assert pair["chosen"] == [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]
    assert pair["rejected"] == [{"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}]


def test_what_pairs_lose_is_counted(make_row, images, tmp_path):
    sides = {"chosen": Answer("A cat."), "rejected": Answer("A dog.")}
    row = make_row(ASK, media=images[:1], contrast=(images[1],), meta={"score": 1}, coordinates="unit", **sides)
    report = write_trl([row, row], tmp_path / "out")
    assert report.written == 2 and report.lost == {"contrast media": 2, "meta": 2, "coordinates": 2}


def test_what_it_cannot_say_is_skipped_and_counted(make_row, images, tmp_path):
    sides = {"media": images[:1], "chosen": Answer("A cat.")}
    sound = MediaItem("audio", tmp_path / "s.wav")
    weighted = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "A", "loss": False}]
    rows = [
        make_row(id="first"),
        make_row([{"type": "audio"}], media=[sound]),
        make_row("Draw.", [{"type": "image"}], media=images[:1]),
        make_row(messages=weighted),
        make_row(ASK, **sides, rejected=Answer("A dog.")),
    ]
    report = write_trl(rows, tmp_path / "out", on_unsayable="skip")
    assert report.written == 1 and sum(report.skipped.values()) == 4
    assert [reason.split(" (")[0] for reason in report.skipped] == [
        "audio or video",
        "images in an assistant's message",
        "a message with a `loss` of its own",
        "a row of the other kind",
    ]
    pairs = [make_row(ASK, **sides, rejected=Answer("A dog.", media=(images[1],)))]
    assert write_trl(pairs, tmp_path / "none", on_unsayable="skip").skipped == {"media of one side of a preference": 1}
    with pytest.raises(RowError, match="row 'r' .here.: media of one side of a preference"):
        write_trl(pairs, tmp_path / "error")
    assert not (tmp_path / "error").exists()
