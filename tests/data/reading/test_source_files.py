"""Which files a source stands for."""

import json
import os

import pytest

from mllm.data.reading import hub
from mllm.data.reading.read import read_records
from mllm.data.reading.source_files import expand_braces, source_files
from mllm.data.sources import Source
from mllm.errors import OptionError


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([{"name": name}]))


def names(source, folder):
    return [str(path.relative_to(folder)) for path in source_files(source)]


def test_braces():
    assert expand_braces("x{a,b}-{8..10}.tar") == [f"x{a}-{n}.tar" for a in "ab" for n in (8, 9, 10)]
    assert expand_braces("{00098..00101}") == ["00098", "00099", "00100", "00101"]
    assert expand_braces("plain.json") == ["plain.json"]


def test_files_globs_and_lists_in_order(tmp_path):
    make(tmp_path, "a.json", "b.json", "c.json", "d[1].json", "sub/e.json")
    assert names(Source(tmp_path / "a.json"), tmp_path) == ["a.json"]
    assert names(Source(f"{tmp_path}/{{c,a}}.json"), tmp_path) == ["c.json", "a.json"]
    assert names(Source(f"{tmp_path}/[a-c].json"), tmp_path) == ["a.json", "b.json", "c.json"]
    assert names(Source(f"{tmp_path}/d[1].json"), tmp_path) == ["d[1].json"]
    assert names(Source(f"{tmp_path}/**/e.json"), tmp_path) == ["sub/e.json"]


def test_a_directory_stands_for_the_data_files_in_it(tmp_path):
    make(tmp_path, "b.json", "a.json", "dataset_info.json", ".hidden.json", "_meta.json", "README.md", "sub/c.json")
    assert names(Source(tmp_path), tmp_path) == ["a.json", "b.json"]
    make(tmp_path, "c.jsonl")
    with pytest.raises(OptionError, match=r"kinds \.json, \.jsonl"):
        source_files(Source(tmp_path))


@pytest.mark.parametrize("path", ["none.json", "none*.json", "{a,none}.json", "empty", "fifo.json", "loop.json"])
def test_what_is_not_there(tmp_path, path):
    make(tmp_path, "a.json")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    with pytest.raises(OptionError, match="data: "):
        source_files(Source(f"{tmp_path}/{path}"))


def test_a_split_of_a_saved_data_set_must_be_named(tmp_path):
    make(tmp_path, "train/0.arrow", "test/0.arrow")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        (tmp_path / split / "state.json").write_text('{"_data_files": [{"filename": "0.arrow"}]}')
    assert names(Source(tmp_path, split="test"), tmp_path) == ["test/0.arrow"]
    for split in ("", "dev"):
        with pytest.raises(OptionError, match="train, test"):
            source_files(Source(tmp_path, split=split))
    (tmp_path / "test" / "state.json").write_text('{"_data_files": [{"filename": "0.arrow"}], "_indices_files": [1]}')
    with pytest.raises(OptionError, match="index over its rows"):
        source_files(Source(tmp_path, split="test"))


CARD = """---
license: mit
configs:
- config_name: ai2d
  data_files:
  - split: train
    path: ai2d/train-*
  - split: test
    path: [ai2d/test-*]
- config_name: chart
  data_files: chart/*.json
---
# A card
"""


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """A folder that stands for the Hub's ORG/NAME; downloads are noted, and give the folder as it is."""
    asked = []

    def snapshot_download(name, *, repo_type, revision, allow_patterns):
        asked.append((name, repo_type, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return asked


def test_the_card_says_which_files_are_of_a_split(tmp_path, on_hub):
    make(tmp_path, "ai2d/train-0.json", "ai2d/train-1.json", "ai2d/test-0.json", "chart/a.json", "chart/b.json")
    (tmp_path / "README.md").write_text(CARD)
    source = Source("hub://ORG/NAME", subset="ai2d", revision="v1")
    assert names(source, tmp_path) == ["ai2d/train-0.json", "ai2d/train-1.json"]
    assert on_hub == [
        ("ORG/NAME", "dataset", "v1", ["README.md"]),
        ("ORG/NAME", "dataset", "v1", ["ai2d/train-*"]),
    ]
    assert names(Source("hub://ORG/NAME", subset="ai2d", split="test"), tmp_path) == ["ai2d/test-0.json"]
    assert names(Source("hub:/ORG/NAME", subset="chart"), tmp_path) == ["chart/a.json", "chart/b.json"]
    assert [record.fields for record in read_records(Source("hub://ORG/NAME", subset="ai2d", split="test"))] == [
        {"name": "ai2d/test-0.json"}
    ]
    with pytest.raises(OptionError, match="ai2d, chart"):
        source_files(Source("hub://ORG/NAME"))
    with pytest.raises(OptionError, match="train, test"):
        source_files(Source("hub://ORG/NAME", subset="ai2d", split="dev"))


def test_without_a_card_the_names_say_it(tmp_path, on_hub):
    make(tmp_path, "data/train-00000-of-00001.json", "data/test-00000-of-00001.json", "data/contest.json")
    assert names(Source("hub://ORG/NAME"), tmp_path) == ["data/train-00000-of-00001.json"]
    assert names(Source("hub://ORG/NAME", split="test"), tmp_path) == ["data/test-00000-of-00001.json"]
    with pytest.raises(OptionError, match="no data files"):
        source_files(Source("hub://ORG/NAME", split="validation"))


def test_files_without_a_split_in_their_names(tmp_path, on_hub):
    make(tmp_path, "captions.json", "more/captions.json", "dataset_infos.json")
    assert names(Source("hub://ORG/NAME"), tmp_path) == ["captions.json", "more/captions.json"]
    assert names(Source("hub://ORG/NAME", subset="more"), tmp_path) == ["more/captions.json"]
    assert names(Source("hub://ORG/NAME/more/*.json"), tmp_path) == ["more/captions.json"]
    assert on_hub[-1][3] == ["more/*.json"]


@pytest.mark.parametrize("path", ["hub://NAME", "hub://"])
def test_no_hub_id(path):
    with pytest.raises(OptionError, match="hub://ORG/NAME"):
        source_files(Source(path))


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise hub.LocalEntryNotFoundError("offline\nand more")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(OptionError, match="hub://ORG/NAME cannot be downloaded: offline"):
        source_files(Source("hub://ORG/NAME"))
