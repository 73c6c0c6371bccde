"""An index is used again exactly as long as it would be built the same, and never taken for whole when it is not."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from mllm.data.indexing import content_keys, index_cache
from mllm.data.indexing.index import RowIndex, open_index
from mllm.data.sources import Source
from mllm.errors import OptionError
from mllm.testing import save_tiny_rows

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def rows(tmp_path) -> Path:
    return save_tiny_rows(tmp_path / "data", 6, num_images=lambda number: 1)


@pytest.fixture
def reopen(tmp_path, rows):
    """Open the rows again."""

    def open_again(**options) -> RowIndex:
        return open_index(Source(rows, **({"format": "mllm"} | options)), cache_dir=tmp_path / "cache")

    return open_again


def _edit(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def test_untouched_files_are_not_read_again(rows, reopen, monkeypatch):
    monkeypatch.setattr(content_keys, "_SETTLED", 0)
    time.sleep(0.05)  # the file is older than the hash, whatever the clock's grain
    first = reopen()
    monkeypatch.setattr(content_keys, "_digest", None)  # reading would fail
    assert reopen().directory == first.directory


def test_a_file_that_has_just_changed_is_not_trusted(rows, reopen, monkeypatch):
    reopen()
    read = []
    digest = content_keys._digest
    monkeypatch.setattr(content_keys, "_digest", lambda *args: read.append(args) or digest(*args))
    reopen()
    assert len(read) == 1  # its time may be that of two contents


def test_touched_files_are_read_and_the_index_is_used_again(rows, reopen):
    first = reopen()
    os.utime(rows, (1, 1))
    assert reopen().directory == first.directory
    copy = rows.with_suffix(".copy")
    copy.write_bytes(rows.read_bytes())
    copy.replace(rows)  # another inode, the same content
    assert reopen().directory == first.directory


@pytest.mark.parametrize("keeps_time", [False, True])
def test_edits_of_the_same_length_are_seen(rows, reopen, keeps_time, monkeypatch):
    monkeypatch.setattr(content_keys, "_SETTLED", 0)
    time.sleep(0.05)
    first = reopen()
    before = rows.stat()
    _edit(rows, "number 3?", "number 8?")
    if keeps_time:
        os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert rows.stat().st_size == before.st_size
    second = reopen()
    assert second.directory != first.directory
    assert second.key != first.key
    assert "number 8?" in str(second[3].messages)
    assert "number 3?" in str(first[3].messages)  # who has the former index keeps it
    _edit(rows, "number 8?", "number 3?")
    assert reopen().directory == first.directory


def test_truncated_and_longer_files_are_seen(rows, reopen):
    text = rows.read_text()
    assert len(reopen()) == 6
    rows.write_text("".join(text.splitlines(keepends=True)[:4]))
    assert len(reopen()) == 4
    rows.write_text(text + text)
    assert len(reopen()) == 12


def test_replaced_files_are_seen(rows, reopen):
    reopen()
    other = rows.with_name("other.jsonl")
    other.write_text(rows.read_text().replace("tiny", "TINY"))
    os.utime(other, ns=(rows.stat().st_atime_ns, rows.stat().st_mtime_ns))
    other.replace(rows)
    assert reopen()[0].source == "TINY"


@pytest.mark.parametrize(
    "options",
    [{"name": "x"}, {"format": ""}, {"coordinates": "unit"}, {"remap": {"a": "b"}}, {"media_root": "elsewhere"}],
)
def test_an_option_that_decides_about_rows_makes_another_index(tmp_path, rows, reopen, options):
    if "media_root" in options:
        (tmp_path / "elsewhere").symlink_to(rows.parent)
        options = {"media_root": tmp_path / "elsewhere"}
    first, second = reopen(), reopen(**options)
    assert first.directory.parent != second.directory.parent
    assert reopen().directory == first.directory


def test_options_that_do_not_share_the_index(rows, reopen):
    directories = {
        reopen(**options).directory
        for options in ({}, {"take": "first:2"}, {"weight": 2.0}, {"licence": "MIT"}, {"on_bad": "quarantine"})
    }
    assert len(directories) == 1
    assert reopen(licence="MIT").licence == "MIT"


def test_a_change_of_the_code_makes_another_index(rows, reopen, monkeypatch):
    first = reopen()
    monkeypatch.setattr(index_cache, "_code_digest", lambda: "mended")
    second = reopen()
    assert second.directory != first.directory
    assert second.key == first.key  # the rows are the same


def test_mended_and_changed_media_are_seen(rows, reopen):
    picture = rows.parent / "images" / "2-0.png"
    data = picture.read_bytes()
    picture.unlink()
    options = {"on_bad": "quarantine", "max_bad_rate": 1.0}
    assert reopen(**options).num_bad == 1
    picture.write_bytes(data)
    whole = reopen(**options)
    assert whole.num_bad == 0
    Image.new("RGB", (3, 5)).save(picture)
    changed = reopen(**options)
    assert changed.num_bad == 1  # it is not of the size on its row any more
    assert changed.key != whole.key


def test_no_more_than_the_former_index_is_kept(rows, reopen):
    picture = rows.parent / "images" / "2-0.png"
    for _ in range(4):
        os.utime(picture)
        directory = reopen().directory
    assert len(list(directory.parent.glob("index-*"))) == 2


def test_a_build_that_fails_leaves_nothing(rows, reopen, monkeypatch, tmp_path):
    read_records = index_cache.read_records

    def interrupted(source):
        for number, record in enumerate(read_records(source)):
            if number == 3:
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(index_cache, "read_records", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reopen()
    assert not list(tmp_path.glob("cache/*/index-*"))
    monkeypatch.undo()
    assert len(reopen()) == 6


def test_what_a_killed_build_leaves_is_not_taken_for_an_index(rows, reopen, monkeypatch, tmp_path):
    read_records = index_cache.read_records

    def killed(source):
        yield from list(read_records(source))[:3]
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(index_cache, "read_records", killed)
    for _ in range(2):
        process = FORK.Process(target=reopen)
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert len(list(tmp_path.glob("cache/*/index-*.partial"))) == 1
    monkeypatch.undo()
    assert len(reopen()) == 6
    assert not list(tmp_path.glob("cache/*/index-*.partial"))


def test_of_several_processes_one_builds_and_all_open(reopen, monkeypatch, tmp_path):
    read_records, reads = index_cache.read_records, tmp_path / "reads"

    def slow(source):
        with reads.open("a") as file:
            file.write("read\n")
        time.sleep(0.3)
        yield from read_records(source)

    monkeypatch.setattr(index_cache, "read_records", slow)
    results = FORK.SimpleQueue()
    processes = [FORK.Process(target=lambda: results.put([row.id for row in reopen()])) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert [results.get() for _ in processes] == [[f"row-{number}" for number in range(6)]] * 4
    assert reads.read_text() == "read\n"


def test_a_file_that_grows_while_it_is_read_is_an_error(rows, reopen, monkeypatch, tmp_path):
    read_records = index_cache.read_records

    def written_meanwhile(source):
        yield from read_records(source)
        rows.write_text(rows.read_text() * 2)

    monkeypatch.setattr(index_cache, "read_records", written_meanwhile)
    with pytest.raises(OptionError, match="changed while it was read"):
        reopen()
    assert not list(tmp_path.glob("cache/*/index-*"))


def test_the_environment_names_the_cache(rows, monkeypatch, tmp_path):
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path / "named"))
    index = open_index(Source(rows, format="mllm"))
    assert index.directory.is_relative_to(tmp_path / "named")
    assert open_index(Source(rows, format="mllm"), cache_dir=tmp_path / "given").directory.is_relative_to(
        tmp_path / "given"
    )


def test_large_files_are_hashed_in_parts_and_by_their_time(tmp_path, monkeypatch):
    monkeypatch.setattr(content_keys, "WHOLE", 1000)
    monkeypatch.setattr(content_keys, "_BLOCK", 16)
    path = tmp_path / "large"
    path.write_bytes(bytes(5000))

    def digest() -> str:
        return content_keys.file_digests([path], manifest=tmp_path / "manifest")[str(path)]

    first = digest()
    assert digest() == first
    path.write_bytes(bytes(4999) + b"\1")
    assert digest() != first


def test_a_damaged_manifest_is_as_good_as_none(tmp_path):
    (tmp_path / "manifest").write_text(json.dumps({})[:1])
    (tmp_path / "file").write_text("a")
    assert len(content_keys.file_digests([tmp_path / "file"], manifest=tmp_path / "manifest")) == 1
