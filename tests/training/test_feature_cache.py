"""The feature cache: what it holds, and what happens when files, disks and processes misbehave."""

import collections
import copy
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from mllm.data.collate import LeavingOut, PaddingCollator
from mllm.data.examples import Examples
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.errors import CheckpointError, MediaError, OptionError
from mllm.models.parts import PartOptions
from mllm.testing import save_tiny_rows, tiny_model
from mllm.training.feature_cache import CachedFeatures, cache, cache_features, check_cacheable, media, store
from mllm.training.feature_cache.key import FeatureSpace
from mllm.training.feature_cache.room import Missing, estimate_fill

NUM_ROWS = 6


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def path(tmp_path) -> Path:
    """Six rows of one image each."""
    return save_tiny_rows(tmp_path / "rows", NUM_ROWS, num_images=lambda number: 1)


@pytest.fixture
def run(parts, path, tmp_path):
    """Have the features of the rows in a cache; also says what was announced, and how many images were encoded."""

    def start(directory: Path = tmp_path / "features", *, rows: Path = path, **options):
        processor = parts[1]
        said: list[str] = []
        done: collections.Counter[str] = collections.Counter()
        examples = Examples(open_mixture(read_mixture([{"path": str(rows), **options.pop("source", {})}])), processor)
        features = cache_features(
            directory,
            examples,
            options.pop("model", parts[0]).model,
            processor,
            say=said.append,
            progress=lambda what, total: lambda count=1: done.update({what: count}),
            **options,
        )
        return features, examples, said, done["encoding media"]

    return start


def _encoded(parts, examples: Examples) -> torch.Tensor:
    """What the encoder gives for the images of all rows, in one batch."""
    model, processor = parts
    pixels = PaddingCollator(processor)([examples[number] for number in range(len(examples))])["pixel_values"]
    tower = model.model.image_tower
    return tower.encode(pixels).detach()


def _read(features: CachedFeatures, examples: Examples) -> torch.Tensor:
    """The images of all rows."""
    media = [list(features.of(examples[number])) for number in range(len(examples))]
    return torch.cat([features.batch(row)["image_features"] for row in media])


def test_what_is_read_is_what_the_encoder_gave_in_a_batch_of_the_same_size(run, parts):
    for num_workers in (0, 2):
        features, examples, said, _ = run(num_workers=num_workers)
        assert torch.equal(_read(features, examples), _encoded(parts, examples))
    assert "6 media, 0 of them to be encoded" in said[0]


def test_every_type_has_features_of_its_own(run, parts, tmp_path):
    half = copy.deepcopy(parts[0]).to(torch.bfloat16)
    features, examples, *_ = run(model=half)
    read = _read(features, examples)
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, _encoded((half, parts[1]), examples))
    mixed = _read(*run(autocast=torch.bfloat16)[:2])
    plain = _read(*run()[:2])
    assert mixed.dtype == plain.dtype == torch.float32 and not torch.equal(mixed, plain)
    assert len(list((tmp_path / "features").glob("*/space.json"))) == 3


def test_the_same_picture_is_encoded_once(run, path, parts):
    """Also where it lies under another name, and in rows that stand far apart."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    shutil.copy(path.parent / "images/0-0.png", path.parent / "images/copy.png")
    rows[3]["media"] = rows[0]["media"]
    rows[5]["media"] = [{**rows[0]["media"][0], "path": "images/copy.png"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    features, examples, said, num_encoded = run()
    assert num_encoded == 4 and "5 media, 4 of them" in said[0]
    torch.testing.assert_close(_read(features, examples), _encoded(parts, examples), rtol=0, atol=1e-6)


def test_other_rows_find_what_is_there(run, path):
    run()
    shorter = path.with_name("shorter.jsonl")
    shorter.write_text("".join(path.read_text().splitlines(keepends=True)[2:]))
    assert run(rows=shorter)[3] == 0


def test_a_changed_file_is_encoded_anew(run, path, parts, monkeypatch):
    """Although it is as long as before, and says that it was written when it was."""
    monkeypatch.setattr(media, "SETTLED_NS", 0)
    before = _read(*run()[:2])
    picture = path.parent / "images" / "2-0.png"
    stamp = picture.stat()
    image = Image.open(picture)
    image.putpixel((0, 0), (1, 2, 3))
    image.save(picture)
    os.utime(picture, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    features, examples, _, num_encoded = run()
    assert num_encoded == 1
    found = _read(features, examples)
    assert not torch.equal(found[2], before[2])
    torch.testing.assert_close(found, _encoded(parts, examples), rtol=0, atol=1e-6)


def test_only_a_file_that_has_rested_is_taken_as_read(run, monkeypatch):
    read = media.open_medium
    for settled, expected in ((media.SETTLED_NS, NUM_ROWS), (0, 0)):
        monkeypatch.setattr(media, "SETTLED_NS", settled)
        run()
        reads: list[object] = []
        monkeypatch.setattr(media, "open_medium", lambda item, reads=reads: reads.append(item) or read(item))
        run()
        monkeypatch.setattr(media, "open_medium", read)
        assert len(reads) == expected


def test_features_that_another_rank_was_to_write_and_are_nowhere(run, monkeypatch):
    monkeypatch.setattr(cache, "VISIBLE_AFTER", (0,))
    monkeypatch.setattr(cache, "fill", lambda *args, **options: {})
    with pytest.raises(OptionError, match=r"(?s)does not hold the features of .*0-0.png.*that all ranks see"):
        run()


def test_a_file_that_changes_during_the_fill_stops_it(run, path, monkeypatch):
    contents_of = cache.contents_of

    def then_change(items, known, **options):
        contents = contents_of(items, known, **options)
        picture = path.parent / "images" / "2-0.png"
        Image.new("RGB", Image.open(picture).size).save(picture)
        return contents

    monkeypatch.setattr(cache, "contents_of", then_change)
    with pytest.raises(OptionError, match="2-0.png has changed since the run began"):
        run()
    monkeypatch.undo()
    assert run()[3] > 0


def test_a_fill_that_was_killed_goes_on(run, tmp_path, parts):
    """The process dies before its fourth picture, and leaves half of a record behind."""
    child = multiprocessing.get_context("fork").Process(target=_die_at, args=(run, 3))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    (index,) = (tmp_path / "features").glob("*/*.index")
    with index.open("ab") as file:
        file.write(b"half a record")
    features, examples, _, num_encoded = run()
    assert num_encoded == NUM_ROWS - 3
    torch.testing.assert_close(_read(features, examples), _encoded(parts, examples), rtol=0, atol=1e-6)


def _die_at(run, number: int) -> None:
    """Encode one by one, every item on record at once, until so many are."""
    store.COMMIT_BYTES = 0
    add, count = store.ShardWriter.add, iter(range(100))

    def counting(self, *args):
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, *args)

    store.ShardWriter.add = counting
    run(batch_size=1)


def test_two_processes_fill_one_directory(run, parts):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    children = [context.Process(target=_fill_beside, args=(run, barrier)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    features, examples, _, num_encoded = run()
    assert num_encoded == 0 and len(features.stores["image"].shards) == 2
    torch.testing.assert_close(_read(features, examples), _encoded(parts, examples), rtol=0, atol=1e-6)


def _fill_beside(run, barrier) -> None:
    """Begin to encode when the other process has seen, too, that nothing is there."""
    check_room = cache.check_room
    cache.check_room = lambda *args: (check_room(*args), barrier.wait(30))
    run(batch_size=1)


def test_a_disk_without_room_is_told_before_anything_is_written(run, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(
        OptionError, match=r"(?s)has 100 B free, and the features of 6 media take 3.2 KiB.*larger disk"
    ):
        run()
    assert not (tmp_path / "features").exists()


def test_a_disk_that_fills_up_is_told_and_what_was_written_stays(run, monkeypatch):
    """The record of the second picture is written by half, and nothing behind it."""
    write, sizes = store._write, []

    def fail_once(file, data):
        sizes.append(len(data))
        if len(sizes) == 7:
            write(file, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        write(file, data)

    monkeypatch.setattr(store, "COMMIT_BYTES", 0)
    monkeypatch.setattr(store, "_write", fail_once)
    with pytest.raises(OptionError, match=r"(?s)cannot be written \(No space left on device\).*goes on"):
        run(batch_size=1)
    assert len(sizes) == 7 and sizes[-1] == store.RECORD.itemsize
    monkeypatch.undo()
    assert run()[3] == NUM_ROWS - 1


def test_the_estimate_is_what_is_written(run, tmp_path):
    features, _, said, _ = run()
    files = [path for path in (tmp_path / "features").glob("*/*") if path.suffix in (".features", ".index")]
    space = features.stores["image"].space
    header = len(json.dumps(store._header(space))) + 1
    estimate = estimate_fill(tmp_path, [Missing(space, num_media=6, num_views=6)], num_media=6)
    assert sum(path.stat().st_size for path in files) - header == estimate.num_bytes
    # CLIP-L of 336 pixels: 24 x 24 patches of width 1024, two bytes each.
    large = FeatureSpace({}, 576, 1024, torch.bfloat16)
    assert estimate_fill(tmp_path, [Missing(large, 1, 5)], num_media=1).num_bytes == 5 * (576 * 1024 * 2 + 36)


@pytest.mark.parametrize("damage", ["a bit", "the end", "the first line"])
def test_a_damaged_file_is_found(run, tmp_path, parts, damage):
    features, examples, *_ = run(source={"on_bad": "quarantine", "max_bad_rate": 1.0})
    (index,) = (tmp_path / "features").glob("*/*.index")
    data = index.with_suffix(".features")
    if damage == "a bit":
        content = bytearray(data.read_bytes())
        content[1000] ^= 1
        data.write_bytes(content)
    elif damage == "the end":
        os.truncate(data, data.stat().st_size - 1)
    else:
        index.write_bytes(b"{" + index.read_bytes()[3:])
    with pytest.raises(CheckpointError, match=f"(?s){data.stem}.*do this: delete .*{data.stem}.features"):
        _read(*run()[:2])
    # In training the error has to pass by a data worker, and must not be taken for a fault of the row.
    if damage == "a bit":
        collated = LeavingOut(PaddingCollator(parts[1], features=features))([examples[n] for n in range(6)])
        (left_out,) = collated.left_out
        with pytest.raises(CheckpointError):
            examples.account.add(left_out)


def test_rows_of_other_data_are_not_given_features_of_these(run, parts, tmp_path):
    """A validation row may have the same number."""
    features, *_ = run()
    other = Examples(open_mixture(read_mixture([str(save_tiny_rows(tmp_path / "other", 3))])), parts[1])
    with pytest.raises(AssertionError, match="'row-1' .* is no row of this run"):
        list(features.of(other[1]))


def _break(path: Path) -> None:
    """Cut a picture: its header stays right."""
    os.truncate(path, path.stat().st_size * 2 // 3)


def test_bad_media_are_left_out_as_without_a_cache(train, path, tmp_path):
    open_mixture(read_mixture([str(path)]))
    _break(path.parent / "images" / "2-0.png")
    options = {"data": [str(path)], "on_bad": "quarantine", "max_bad_rate": 0.5, "parts": {"image.connector": "full"}}
    options |= {"max_steps": 6, "optim": "sgd"}
    plain = train(tmp_path / "plain", **options)
    cached = train(tmp_path / "cached", **options, feature_cache=str(tmp_path / "features"))
    lists = [(run / "quarantine.jsonl").read_text() for run in (plain, cached)]
    assert lists[0] == lists[1] and "2-0.png" in lists[0]
    counts = [json.loads((run / "final" / "run.json").read_text())["rows"]["left_out"] for run in (plain, cached)]
    assert counts[0] == counts[1] == {"bad row or media": 2}


def test_bad_media_stop_the_fill_where_they_are_errors(run, path):
    _break(path.parent / "images" / "2-0.png")
    with pytest.raises(MediaError, match="'row-2'.*2-0.png' is a damaged or truncated PNG"):
        run()
    with pytest.raises(MediaError, match="(?s)1 of 6 rows found to be broken.*at most 10.00%"):
        run(source={"on_bad": "quarantine", "max_bad_rate": 0.1})


def test_an_encoder_that_is_trained_is_refused(parts):
    for mode in ("lora", "full"):
        with pytest.raises(OptionError, match=f"(?s)image.encoder = {mode}.*set `image.encoder: frozen`"):
            check_cacheable(parts[0], {"image.encoder": PartOptions(mode)})


def test_a_model_of_another_kind_is_refused(parts):
    with pytest.raises(OptionError, match="(?s)LlamaModel.*leave `feature_cache` out"):
        check_cacheable(parts[0].model.language_model, {})
