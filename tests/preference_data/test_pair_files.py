"""Rows that are written find their images again, wherever these lay."""

import io

import pytest
from PIL import Image

from mllm.data.indexing.index import open_index
from mllm.data.mixture_file import read_mixture
from mllm.data.schema import Blob, MediaItem, Row
from mllm.preference_data.answered import take_apart
from mllm.preference_data.outcomes import Outcome
from mllm.preference_data.pair_files import write_pairs


def picture(colour):
    file = io.BytesIO()
    Image.new("RGB", (9, 7), colour).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kinds", ["files", "embedded", "both"])
def test_images_are_found_again(tmp_path, kinds):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here/red.png").write_bytes(picture("red"))
    (tmp_path / "there/blue.png").write_bytes(picture("blue"))
    (tmp_path / "box").write_bytes(b"front" + picture("blue"))
    red = MediaItem("image", tmp_path / "here/red.png", 7, 9)
    blue = MediaItem("image", tmp_path / "there/blue.png", 7, 9)
    inside = MediaItem("image", None, 7, 9, blob=Blob(tmp_path / "box", offset=5, length=len(picture("blue"))))
    own, other = {"files": (red, blue), "embedded": (inside, inside), "both": (red, inside)}[kinds]
    messages = [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": "A red thing."},
    ]
    row = Row("one", "world", messages, (own,), "rows.jsonl, line 1", coordinates="unit")
    out = tmp_path / "pairs"
    out.mkdir()
    pair = (take_apart(row), other, Outcome(0, tries=("",), rejected="A blue thing."))
    write_pairs([pair], [own, other], out, licence="CC0")
    (source,) = read_mixture({"mixture": str(out / "mixture.yaml")}).sources
    (found,) = open_index(source)
    assert found.media[0].path.read_bytes() == picture("blue" if kinds == "embedded" else "red")
    assert found.contrast[0].path.read_bytes() == picture("blue")
    assert (found.id, found.source, found.coordinates, source.licence) == ("one", "world", "unit", "CC0")
