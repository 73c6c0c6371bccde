"""The feature cache of sounds, videos and tiles: features are kept by view, and laid out by the sizes of the media."""

import collections
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mllm.data import collate
from mllm.data.collate import PackingCollator, PaddingCollator
from mllm.data.examples import Examples
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.errors import MediaError, OptionError
from mllm.models.media import VALUES
from mllm.models.parts import PartOptions
from mllm.testing import tiny_model
from mllm.testing_media import save_tiny_media_rows
from mllm.testing_sounds import sine, write_wav
from mllm.training.feature_cache import CachedFeatures, cache_features, check_cacheable
from mllm.training.feature_cache.fill import groups

CONTENTS = ("itav", "", "vv", "a", "iai", "avi")
TOWERS = {
    "image": {"tiles": {"type": "llava_next", "max_tiles": 4}},
    "audio": {"connector": {"type": "pool", "size": 2}},
    "video": {"connector": {"type": "perceiver", "num_latents": 3, "depth": 1, "per": "item"}, "frames": "fps:2:2:8"},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("parts"), **TOWERS)


@pytest.fixture
def rows(tmp_path) -> Path:
    return save_tiny_media_rows(tmp_path / "rows", CONTENTS)


@pytest.fixture
def run(parts, tmp_path):
    """Have the features of rows in a cache; also says how many views each fill wrote, by kind."""

    def start(rows: Path, *, parts=parts, **options) -> tuple[CachedFeatures, Examples, dict[str, int], list[str]]:
        model, processor = parts
        directory, said = tmp_path / "features", []
        before = _num_views(directory)
        examples = _examples(parts, rows, **options.pop("source", {}))
        features = cache_features(
            directory,
            examples,
            model.model,
            processor,
            say=said.append,
            progress=lambda what, total: lambda count=1: None,
            **options,
        )
        found = {kind: _num_views(store.directory) for kind, store in features.stores.items()}
        written = {kind: count - before[features.stores[kind].directory.name] for kind, count in found.items()}
        return features, examples, written, said

    start.parts = parts
    return start


def _examples(parts, rows: Path, **source) -> Examples:
    return Examples(open_mixture(read_mixture([{"path": str(rows), **source}])), parts[1])


def _num_views(directory: Path) -> collections.Counter[str]:
    """Records in the cache, by space; or of one space."""
    counts: collections.Counter[str] = collections.Counter()
    for index in directory.rglob("*.index"):
        counts[index.parent.name] += (index.stat().st_size - index.read_bytes().index(b"\n") - 1) // 36
    return counts if not list(directory.glob("*.index")) else counts[directory.name]


def _all(examples: Examples) -> list:
    return [examples[number] for number in range(len(examples))]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("collator", [PaddingCollator, PackingCollator])
def test_a_batch_of_features_has_the_sizes_and_the_features_of_the_media(run, rows, parts, collator, num_workers):
    model, processor = parts
    features, examples, *_ = run(rows, num_workers=num_workers)
    plain = collator(processor)(_all(examples))
    cached = collator(processor, features=features)(_all(examples))
    assert not cached.keys() & set(VALUES.values())
    for name in ("image_sizes", "audio_sizes", "video_sizes", "input_ids"):
        assert torch.equal(cached[name], plain[name]), name
    towers = model.model.towers
    for kind, tower in (("image", "image"), ("audio", "audio"), ("video", "image")):
        sizes = plain["audio_sizes"] if kind == "audio" else None
        encoded = towers[tower].encode(plain[VALUES[kind]], sizes).detach()
        assert len(encoded) >= 6
        torch.testing.assert_close(cached[f"{kind}_features"], encoded, rtol=0, atol=1e-6)


def test_a_batch_without_media_has_features_of_no_views(run, rows, parts):
    features, examples, *_ = run(rows)
    batch = PaddingCollator(parts[1], features=features)([examples[1]])
    assert {name: len(batch[name]) for name in batch if "features" in name} == {
        "image_features": 0, "audio_features": 0, "video_features": 0,
    }  # fmt: skip
    assert not [name for name in batch if name.endswith("_sizes")]
    loss = parts[0](**batch).loss
    assert torch.isfinite(loss)


def test_what_is_there_is_not_encoded_again(run, rows, tmp_path):
    _, _, written, said = run(rows)
    assert min(written.values()) >= 6 and "12 media, 12 of them to be encoded" in said[0]
    _, _, again, said = run(rows)
    assert set(again.values()) == {0} and "12 media, 0 of them" in said[0]


def test_a_frame_is_found_again_whatever_other_frames_are_seen(run, rows, parts, tmp_path):
    """Every frame of fps:2 is one of fps:4's."""
    _, examples, written, _ = run(rows)
    dense = tiny_model(tmp_path / "dense", **{**TOWERS, "video": {**TOWERS["video"], "frames": "cap:5:64"}})
    features, examples, more, _ = run(rows, parts=dense)
    videos = [item for row in _all(examples) for item in row.row.media if item.kind == "video"]
    moments = [set(one.frame_times(item.size)) for item in videos for one in (parts[1], dense[1])]
    sparse, all_moments = moments[::2], moments[1::2]
    assert written["video"] == sum(map(len, sparse))
    assert more["video"] == sum(len(b - a) for a, b in zip(sparse, all_moments, strict=True))
    assert 0 < more["video"] < sum(map(len, all_moments))
    assert more["image"] == more["audio"] == 0


def test_a_video_of_few_frames_shows_some_of_them_twice_and_keeps_them_once(run, rows, tmp_path):
    many = tiny_model(tmp_path / "many", **{**TOWERS, "video": {**TOWERS["video"], "frames": "uniform:20"}})
    features, examples, written, _ = run(rows, parts=many)
    videos = [item for row in _all(examples) for item in row.row.media if item.kind == "video"]
    assert written["video"] == sum(item.frames for item in videos) < 20 * len(videos)
    batch = PaddingCollator(many[1], features=features)(_all(examples))
    assert len(batch["video_features"]) == 20 * len(videos)


def test_the_batches_of_a_fill_have_so_many_views_and_no_more(run, rows, parts, monkeypatch):
    calls = []
    tower = type(parts[0].model.image_tower)
    encode = tower.encode

    def counting(self, values, sizes=None):
        calls.append((self.rule.kind, len(values)))
        return encode(self, values, sizes)

    monkeypatch.setattr(tower, "encode", counting)
    run(rows, batch_size=2)
    assert max(count for kind, count in calls if kind == "image") == 2
    assert groups([1, 1, 8, 1], 2) == [[0, 1], [2], [3]]
    assert groups([3, 3, 3], 6) == [[0, 1], [2]] and groups([], 4) == []


def test_a_damaged_sound_is_bad_as_without_a_cache(run, rows):
    """Its header is right; and the other rows are trained on."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    path = rows.parent / "media" / "3-0.flac"
    soundfile.write(path, np.random.default_rng(0).normal(size=8000).astype(np.float32) / 4, 16000)
    lines[3]["media"] = [{"kind": "audio", "path": "media/3-0.flac", "seconds": 0.5}]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    open_mixture(read_mixture([str(rows)]))
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(MediaError) as plain:
        PaddingCollator(run.parts[1])([_examples(run.parts, rows)[3]])
    with pytest.raises(MediaError, match="'row-3'.*3-0.flac") as cached:
        run(rows)
    assert cached.value.found == plain.value.found
    features, examples, *_ = run(rows, source={"on_bad": "quarantine", "max_bad_rate": 0.5})
    with pytest.raises(MediaError, match="'row-3' .*3-0.flac"):
        list(features.of(examples[3]))
    assert len(list(features.of(examples[0]))) == 3


def test_a_sound_of_another_length_than_its_row_says_is_bad_as_without_a_cache(run, rows, monkeypatch):
    """Such as one whose header does not tell the truth."""
    decode = collate.decode_audio
    monkeypatch.setattr(collate, "decode_audio", lambda *args, **options: (decode(*args, **options)[0][:-4000], 16000))
    with pytest.raises(MediaError) as plain:
        PaddingCollator(run.parts[1])([_examples(run.parts, rows)[0]])
    with pytest.raises(MediaError, match="'row-0'.*: a sound of .* s, which the row says is") as cached:
        run(rows)
    assert cached.value.found == plain.value.found


def test_a_cut_of_a_file_has_features_of_its_own(run, rows):
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines[4]["media"][1] = {**lines[3]["media"][0], "end": 0.5}
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    features, examples, *_ = run(rows)
    whole, cut = next(features.of(examples[3])), list(features.of(examples[4]))[1]
    assert whole.features.shape == cut.features.shape
    assert not torch.equal(whole.features, cut.features) and cut.size == (0.5,)


def test_a_file_that_has_changed_is_encoded_anew(run, rows):
    first = next(run(rows)[0].of(run(rows)[1][3])).features
    path = rows.parent / "media" / "3-0.wav"
    seconds = json.loads(rows.read_text().splitlines()[3])["media"][0]["seconds"]
    write_wav(path, sine(seconds, pitch=900.0))
    features, examples, written, _ = run(rows)
    assert written["audio"] == 1 and written["image"] == written["video"] == 0
    assert not torch.equal(next(features.of(examples[3])).features, first)


def test_every_encoder_has_to_be_frozen(parts):
    with pytest.raises(OptionError, match="(?s)audio.encoder = full.*set `audio.encoder: frozen`"):
        check_cacheable(parts[0], {"audio.encoder": PartOptions("full")})
    assert check_cacheable(parts[0], {"video.connector": PartOptions("full")}) is parts[0].model


def test_the_estimate_counts_views(run, rows, tmp_path):
    features, _, written, said = run(rows)
    sizes = {kind: store.space.view_bytes + 36 for kind, store in features.stores.items()}
    num_bytes = sum(written[kind] * sizes[kind] for kind in written)
    assert f": {num_bytes / 1024:,.1f} KiB of" in said[0]
