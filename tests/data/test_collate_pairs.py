"""Batches of pairs: media once with their places, or as often as they stand in texts; what is changed for a side."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mllm.data.collate import LeavingOut, PackingCollator, PaddingCollator
from mllm.data.collate_pairs import PairCollator
from mllm.data.contrasts import Contrast, Shown, changed_data
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.data.pairs import Pairs
from mllm.data.schema import MediaItem
from mllm.errors import MediaError
from mllm.load import load_processor
from mllm.testing_media import save_tiny_media_rows
from mllm.testing_pairs import save_tiny_pairs

RETRIEVED = Contrast("retrieved")
CONTRASTS = {
    "none": Contrast(), "retrieved": RETRIEVED, "crop": Contrast("crop"), "blank": Contrast("blank"),
    "unseen": Contrast(is_unseen_needed=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def processor(assembled):
    return load_processor(assembled)


def _examples(path: Path, processor, contrast: Contrast) -> Pairs:
    return Pairs(open_mixture(read_mixture([str(path)])), processor, contrast=contrast)


def _collator(processor, contrast, *, shares_media=True, kind=PaddingCollator, **options) -> PairCollator:
    texts = kind(processor, source_of=lambda _: 0)
    return PairCollator(texts, contrast=contrast, shares_media=shares_media, **options)


def _media(path: Path, processor, contrast: Contrast) -> list[list[Image.Image]]:
    """The pictures of each pair, as a batch has them."""
    collate = _collator(processor, contrast)
    return [[medium.data for medium in collate.media_of(pair)] for pair in _examples(path, processor, contrast)]


@pytest.mark.parametrize("contrast", CONTRASTS.values(), ids=CONTRASTS.keys())
@pytest.mark.parametrize("kind", [PaddingCollator, PackingCollator])
def test_shared_media_at_their_places_are_the_repeated_ones(pairs, processor, contrast, kind):
    examples = _examples(pairs, processor, contrast)
    batch = [examples[number] for number in (3, 0, 5)]
    shared = _collator(processor, contrast, kind=kind)(batch)
    repeated = _collator(processor, contrast, kind=kind, shares_media=False)(batch)
    assert len(shared["pixel_values"]) == sum(len(pair.shown) for pair in batch) < len(repeated["pixel_values"])
    places = shared.pop("image_places")
    for name, values in repeated.items():
        found = shared[name][places] if name in ("pixel_values", "image_sizes") else shared[name]
        assert torch.equal(found, values) if torch.is_tensor(values) else found == values


def test_rows_are_sides_pair_by_pair(pairs, processor):
    examples = _examples(pairs, processor, RETRIEVED)
    batch = _collator(processor, RETRIEVED)([examples[2], examples[4]])
    sides = [side for number in (2, 4) for side in examples[number].sides]
    assert len(batch["input_ids"]) == 6 and batch["sources"].tolist() == [0, 0]
    for row, side in zip(batch["input_ids"], sides, strict=True):
        assert row[: side.length].tolist() == side.input_ids.tolist()


def test_a_batch_has_what_the_reference_said(pairs, processor):
    examples = _examples(pairs, processor, RETRIEVED)
    collate = _collator(processor, RETRIEVED, reference=lambda position: [position, position + 0.5, -1.0])
    batch = collate([examples[2], examples[4]])
    assert batch["reference_log_probs"].tolist() == [[2.0, 2.5, -1.0], [4.0, 4.5, -1.0]]
    assert collate([])["reference_log_probs"].shape == (0, 3)


@pytest.mark.parametrize("kind", [PaddingCollator, PackingCollator])
def test_no_pairs_are_a_batch_with_nothing_to_learn(pairs, processor, kind):
    batch = _collator(processor, RETRIEVED, kind=kind)([])
    assert (batch["labels"] == -100).all() and len(batch["sources"]) == 0 and "pixel_values" not in batch


def test_media_of_several_kinds_are_numbered_apart(tmp_path):
    """An image and a sound in each row: places count images among images."""
    from mllm.testing import tiny_model

    model, processor = tiny_model(tmp_path / "parts", audio={"window_seconds": 0.25})
    rows = save_tiny_media_rows(tmp_path / "rows", ["ia", "a", "i"])
    with rows.open(encoding="utf-8") as lines, (tmp_path / "rows" / "pairs.jsonl").open("w") as file:
        for line in lines:
            row = json.loads(line)
            row["messages"] = row["messages"][:1]
            file.write(json.dumps(row | {"chosen": {"content": "Yes."}, "rejected": {"content": "No."}}) + "\n")
    examples = _examples(tmp_path / "rows" / "pairs.jsonl", processor, Contrast())
    batch = _collator(processor, Contrast())([examples[number] for number in range(3)])
    assert batch["image_places"].tolist() == batch["audio_places"].tolist() == [0, 0, 1, 1]


def test_a_crop_is_the_same_in_every_epoch_and_another_for_every_row(tmp_path, processor):
    path = _noisy_pairs(tmp_path)
    (own, crop), (_, crop_of_other) = _media(path, processor, Contrast("crop"))
    assert own.size == crop.size
    assert np.array_equal(crop, _media(path, processor, Contrast("crop"))[0][1])
    assert not np.array_equal(crop, crop_of_other), "one picture, two rows"
    assert not np.array_equal(crop, _media(path, processor, Contrast("crop", seed=1))[0][1])


def test_blank_media_show_their_mean_colour(tmp_path, processor):
    path = _noisy_pairs(tmp_path)
    own, blank = (np.asarray(picture).reshape(-1, 3) for picture in _media(path, processor, Contrast("blank"))[0])
    colours = np.unique(blank, axis=0)
    assert len(colours) == 1 and np.abs(colours[0] - own.mean(0)).max() <= 0.5


def test_a_retrieved_copy_of_the_own_picture_is_damage(pairs, processor, tmp_path):
    """Another file, which shows the same."""
    folder = shutil.copytree(pairs.parent, tmp_path / "rows")
    with Image.open(folder / "1-own.png") as picture:
        picture.save(folder / "1-retrieved.png", compress_level=0)
    examples = _examples(folder / "pairs.jsonl", processor, RETRIEVED)
    collate = _collator(processor, RETRIEVED)
    with pytest.raises(MediaError, match="row '1'.*1-retrieved.png, shows what the row's own shows"):
        list(collate.media_of(examples[1]))
    collated = LeavingOut(collate)([examples[0], examples[1], examples[2]])
    assert collated.positions == (0, 2) and len(collated.batch["input_ids"]) == 6
    (left_out,) = collated.left_out
    assert left_out.bad.id == "1" and left_out.bad.file.endswith("1-retrieved.png")


def test_a_damaged_medium_takes_only_its_pair(pairs, processor, tmp_path):
    folder = shutil.copytree(pairs.parent, tmp_path / "rows")
    examples = _examples(folder / "pairs.jsonl", processor, RETRIEVED)
    (folder / "2-retrieved.png").write_bytes(b"nothing")
    collated = LeavingOut(_collator(processor, RETRIEVED))([examples[0], examples[2]])
    assert collated.positions == (0,) and collated.left_out[0].bad.file.endswith("2-retrieved.png")


def test_sounds_and_videos_are_blanked_too():
    blank = Shown(MediaItem("audio", Path("a.wav")), "blank")
    silence = changed_data(np.ones(5, np.float32), blank, (0.01, 0.2))
    assert silence.dtype == np.float32 and not silence.any()
    frames = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (10, 20)]
    assert [frame.getpixel((0, 0))[0] for frame in changed_data(frames, blank, (0.01, 0.2))] == [10, 20]


def _noisy_pairs(directory: Path) -> Path:
    """Two rows about one picture of noise."""
    path = save_tiny_pairs(directory, 2)
    noise = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(directory / "0-own.png")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["media"] = [{"kind": "image", "path": "0-own.png", "height": 20, "width": 20}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
