"""The recipes for video and audio on miniatures of the published files."""

import json


def read_rows(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def test_video_instruct(tmp_path, convert):
    rows = [
        {"q": "What happens?", "a": "A man QA_GT_caption_based_noisy jumps.", "video_id": "v_k_ZXmr8pmrs"},
        {"q": "Who?", "a": "A man.", "video_id": "v_gone"},
    ]
    path = tmp_path / "VideoInstruct100K.json"
    path.write_text(json.dumps(rows))
    (tmp_path / "v_k_ZXmr8pmrs.mkv").write_bytes(b"not looked into")
    facts = convert("video_instruct", path, tmp_path / "rows", "--file", "{video_id}.mkv", "--on_missing", "drop")
    (row,) = read_rows(tmp_path / "rows")
    assert row["media"] == [{"kind": "video", "path": "v_k_ZXmr8pmrs.mkv"}]
    assert row["messages"] == [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]},
        {"role": "assistant", "content": "A man  jumps."},
    ]
    assert facts["missing_media"] == {"v_": 1} and facts["media"] == {"video v_": 2}


def test_clotho(tmp_path, convert):
    header = ",".join(["file_name", *(f"caption_{number}" for number in range(1, 6))])
    captions = [f"Rain, number {number}." for number in range(1, 6)]
    line = ",".join(["Rain (1).wav", *(f'"{caption}"' for caption in captions)])
    path = tmp_path / "clotho_captions_development.csv"
    path.write_text(f"{header}\n{line}\n")
    (tmp_path / "development").mkdir()
    (tmp_path / "development/Rain (1).wav").write_bytes(b"not looked into")
    options = ("--part", "development", "--media_root", tmp_path / "development")
    facts = convert("clotho", path, tmp_path / "rows", *options)
    rows = read_rows(tmp_path / "rows")
    assert [row["messages"][1]["content"] for row in rows] == captions
    assert {row["source"] for row in rows} == {"clotho/development"}
    assert all(row["media"] == [{"kind": "audio", "path": "Rain (1).wav"}] for row in rows)
    assert (facts["records"], facts["rows"], facts["part"]) == (1, 5, "development")
    facts = convert(
        "clotho", path, tmp_path / "first", *options, "--captions", "first", "--question", "What is heard?"
    )
    (row,) = read_rows(tmp_path / "first")
    assert row["messages"][0]["content"] == [{"type": "audio"}, {"type": "text", "text": "What is heard?"}]
