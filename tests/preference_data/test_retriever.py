"""Retrieval: the nearest images, without the image itself and its copies; and a search that is killed goes on."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mllm.data.schema import MediaItem
from mllm.errors import OptionError
from mllm.preference_data import retriever
from mllm.preference_data.pictures import embed_pictures
from mllm.preference_data.retriever import NOBODY, SEARCHES, Retrieval, find_neighbours

ALL = Retrieval(top_k=4, copy_levels=0.0)


class Blocks:
    """Sees the mean colour of 2 x 2 blocks, less the grey in the middle."""

    def __init__(self):
        self.seen = 0

    def embed(self, images):
        self.seen += len(images)
        small = [np.asarray(image.resize((2, 2), Image.Resampling.BOX), np.float32) - 127.5 for image in images]
        return torch.tensor(np.stack(small).reshape(len(images), -1))


@pytest.fixture
def items(tmp_path):
    """Twenty pictures; the eighth is a smaller JPEG of the third, and the twelfth is damaged behind its header."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(20):
        blocks = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(blocks).resize((240, 200), Image.Resampling.BICUBIC)
        paths.append(tmp_path / f"{number}.png")
        image.save(paths[-1])
    Image.open(paths[3]).resize((180, 150)).save(paths[8].with_suffix(".jpg"), quality=80)
    paths[8] = paths[8].with_suffix(".jpg")
    paths[12].write_bytes(paths[12].read_bytes()[:-2000])
    return [MediaItem("image", path, 200, 240) for path in paths]


@pytest.fixture
def pictures(items, tmp_path):
    return embed_pictures(items, Blocks(), tmp_path / "pictures", batch_size=8)


def search_of(name):
    if name == "faiss":
        pytest.importorskip("faiss")
    return name


def test_vectors_have_length_one_and_damaged_images_have_none(pictures):
    lengths = np.linalg.norm(pictures["vector"].astype(np.float64), axis=1)
    assert list(np.flatnonzero(pictures["is_read"] == 0)) == [12]
    assert lengths[12] == 0 and np.allclose(np.delete(lengths, 12), 1, atol=1e-6)


@pytest.mark.parametrize("name", SEARCHES)
def test_neighbours_are_those_of_a_search_in_float64(pictures, tmp_path, name):
    found = find_neighbours(pictures, tmp_path / "neighbours", ALL, search=search_of(name))
    vectors = pictures["vector"].astype(np.float64)
    for own in set(range(20)) - {12}:
        cosines = vectors @ vectors[own]
        cosines[[own, 12]] = -9
        nearest = np.argsort(-cosines)[:4]
        assert found["number"][own].tolist() == nearest.tolist()
        assert np.allclose(found["cosine"][own], cosines[nearest], atol=1e-6)
    assert found["number"][12].tolist() == [NOBODY] * 4


@pytest.mark.parametrize("name", SEARCHES)
def test_copies_are_left_out_and_the_next_take_their_places(pictures, tmp_path, name):
    some = find_neighbours(pictures, tmp_path / "all", ALL, search=search_of(name))
    found = find_neighbours(pictures, tmp_path / "few", Retrieval(top_k=4), search=name)
    assert some["number"][3][0] == 8 and some["number"][8][0] == 3
    assert found["number"][3][:3].tolist() == some["number"][3][1:].tolist()
    assert (found["number"][[3, 8]] != NOBODY).all()
    others = np.delete(np.arange(20), [3, 8])
    assert (found["number"][others] == some["number"][others]).all()


@pytest.mark.parametrize("name", SEARCHES)
def test_too_near_is_left_out(pictures, tmp_path, name):
    some = find_neighbours(pictures, tmp_path / "all", Retrieval(19, copy_levels=0.0), search=search_of(name))
    found = find_neighbours(pictures, tmp_path / "few", Retrieval(19, 0.2, copy_levels=0.0), search=name)
    for all_of_one, few_of_one in zip(some, found, strict=True):
        kept = (all_of_one["cosine"] <= 0.2) & (all_of_one["number"] != NOBODY)
        assert few_of_one["number"][: kept.sum()].tolist() == all_of_one["number"][kept].tolist()
        assert (few_of_one["number"][kept.sum() :] == NOBODY).all()


@pytest.mark.parametrize("name", SEARCHES)
def test_behind_any_number_of_copies_others_are_found(tmp_path, name):
    image = Image.new("RGB", (20, 20), (200, 10, 10))
    image.save(tmp_path / "copy.png")
    paths = [tmp_path / f"copy{number}.png" for number in range(30)]
    for path in paths:
        path.write_bytes((tmp_path / "copy.png").read_bytes())
    for number in range(3):
        paths.append(tmp_path / f"other{number}.png")
        Image.new("RGB", (20, 20), (20, 200, 60 * number)).save(paths[-1])
    items = [MediaItem("image", path, 20, 20) for path in paths]
    pictures = embed_pictures(items, Blocks(), tmp_path / "pictures", batch_size=8)
    found = find_neighbours(pictures, tmp_path / "neighbours", Retrieval(top_k=2), search=search_of(name))
    assert set(found["number"][:30].ravel()) <= {30, 31, 32}
    assert 30 not in found["number"][30]


def test_killed_anywhere_the_files_become_the_same(items, tmp_path, monkeypatch):
    monkeypatch.setattr(retriever, "BLOCK", 8)
    whole = embed_pictures(items, Blocks(), tmp_path / "pictures", batch_size=8).tobytes()
    pictures = (tmp_path / "pictures").read_bytes()
    found = find_neighbours(np.memmap.copy(_read(items, tmp_path)), tmp_path / "neighbours", ALL, search="numpy")
    neighbours = (tmp_path / "neighbours").read_bytes()
    for share in np.linspace(0, 1, 23):
        (tmp_path / "torn").write_bytes(pictures[: int(share * len(pictures))])
        embedder = Blocks()
        again = embed_pictures(items, embedder, tmp_path / "torn", batch_size=8)
        assert again.tobytes() == whole and (tmp_path / "torn").read_bytes() == pictures
        assert embedder.seen <= 20 - 8 * int(share * 20 / 8) + 8
        (tmp_path / "torn2").write_bytes(neighbours[: int(share * len(neighbours))])
        again = find_neighbours(_read(items, tmp_path), tmp_path / "torn2", ALL, search="numpy")
        assert again.tobytes() == found.tobytes() and (tmp_path / "torn2").read_bytes() == neighbours
    assert Blocks().seen == 0 and embedder.seen == 0  # nothing was missing at last


def _read(items, tmp_path):
    return embed_pictures(items, Blocks(), tmp_path / "pictures", batch_size=8)


def test_images_inside_other_files_are_embedded_too(tmp_path):
    from mllm.data.schema import Blob

    file = io.BytesIO()
    Image.new("RGB", (9, 9), "blue").save(file, "PNG")
    (tmp_path / "box").write_bytes(b"front" + file.getvalue())
    blob = Blob(tmp_path / "box", offset=5, length=len(file.getvalue()))
    found = embed_pictures([MediaItem("image", None, 9, 9, blob=blob)], Blocks(), tmp_path / "p", batch_size=4)
    assert found["is_read"].tolist() == [1] and (found["small"][0] == [0, 0, 255]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"top_k": 0}, "top_k = 0"), ({"max_similarity": 2.0}, "max_similarity"), ({"copy_levels": -1.0}, "copy_levels")],
)
def test_wrong_options(options, message):
    with pytest.raises(OptionError, match=message):
        Retrieval(**options)


def test_unknown_search(pictures, tmp_path):
    with pytest.raises(OptionError, match="faiss, numpy"):
        find_neighbours(pictures, tmp_path / "neighbours", ALL, search="luck")


@pytest.mark.parametrize("name", SEARCHES)
def test_what_cannot_be_read_is_never_retrieved(items, pictures, tmp_path, name):
    """Not even where it would be nearer than all that can be."""
    some = np.array(pictures[[0, 1, 12]])
    some["vector"][1] = -some["vector"][0]
    found = find_neighbours(some, tmp_path / "neighbours", Retrieval(top_k=2), search=search_of(name))
    assert found["number"].tolist() == [[1, NOBODY], [0, NOBODY], [NOBODY, NOBODY]]
