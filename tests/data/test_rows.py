import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image

from mllm.data.rows import Rows, RowSource, check_media
from mllm.errors import MediaError, OptionError, RowError
from mllm.testing import save_tiny_rows


def test_rows_of_several_files_in_order(tmp_path):
    one, two = save_tiny_rows(tmp_path / "one", 5), save_tiny_rows(tmp_path / "two", 4)
    rows = Rows([RowSource(one, first=2), RowSource(two)])
    assert len(rows) == 6
    assert [row.id for row in rows] == ["row-0", "row-1", "row-0", "row-1", "row-2", "row-3"]
    assert rows[3].media[0].path == tmp_path / "two" / "images" / "1-0.png"
    assert f"{two}, row number 2" in rows[3].where
    assert rows.fingerprints() == [
        {"path": str(path), "rows": count, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path, count in ((one, 2), (two, 4))
    ]
    for index in (6, -1):
        with pytest.raises(IndexError):
            rows[index]


def test_blank_lines_and_letters_of_several_bytes_do_not_shift_rows(tmp_path):
    row = {"messages": [{"role": "user", "content": "Grüße 你好"}, {"role": "assistant", "content": "ja"}]}
    lines = [json.dumps({"id": str(number), **row}, ensure_ascii=False) for number in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([lines[0], "", "  ", lines[1], lines[2]]), encoding="utf-8")  # and no newline at the end
    assert [row.id for row in Rows([RowSource(path)])] == ["0", "1", "2"]


def test_a_missing_and_an_empty_file(tmp_path):
    with pytest.raises(OptionError, match="data: .*none.jsonl is not there"):
        Rows([RowSource(tmp_path / "none.jsonl")])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(OptionError, match="has no rows"):
        Rows([RowSource(tmp_path / "empty.jsonl")])


def test_a_bad_line_is_named(tmp_path):
    path = save_tiny_rows(tmp_path / "rows", 2)
    path.write_text(path.read_text() + '{"id": "3", \n')
    with pytest.raises(RowError, match=r"rows.jsonl, row number 3: "):
        Rows([RowSource(path)])[2]
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(RowError, match="row number 1"):
        Rows([RowSource(path)])[0]


def test_good_media_pass_and_are_counted(tmp_path):
    seen = []
    check_media(Rows([RowSource(save_tiny_rows(tmp_path / "rows", 6))]), progress=lambda: seen.append(1))
    assert len(seen) == 6


def test_bad_media_are_found_together(tmp_path):
    rows = Rows([RowSource(save_tiny_rows(tmp_path / "rows", 9, num_images=lambda number: 1))])
    images = tmp_path / "rows" / "images"
    (images / "0-0.png").unlink()
    (images / "1-0.png").write_text("this is no picture")
    _resize(images / "2-0.png")
    with pytest.raises(MediaError) as caught:
        check_media(rows)
    assert "3 media items that cannot be used" in caught.value.found
    for name in ("row 'row-0'", "0-0.png", "row 'row-1'", "1-0.png", "is 3 x 2, the row says"):
        assert name in caught.value.found
    assert "row-3" not in caught.value.found


def test_no_more_than_five_are_shown(tmp_path):
    rows = Rows([RowSource(save_tiny_rows(tmp_path / "rows", 9, num_images=lambda number: 1))])
    for path in (tmp_path / "rows" / "images").iterdir():
        path.unlink()
    with pytest.raises(MediaError, match="9 media items") as caught:
        check_media(rows)
    assert caught.value.found.count("\n") == 5


def _resize(path: Path) -> None:
    Image.new("RGB", (2, 3)).save(path)
