"""`data:` in all its forms."""

from pathlib import Path

import pytest
import yaml

from mllm.data.mixture_file import MixtureOptions, expand_braces, read_mixture
from mllm.data.sources import Source
from mllm.errors import OptionError


def test_a_list_of_paths_and_mappings():
    data = ["a.jsonl", {"path": "/b.json", "first": 3}, {"path": "hub://ORG/NAME", "split": "train", "weight": 2}]
    assert read_mixture(data, root="/d") == MixtureOptions(
        (
            Source(Path("/d/a.jsonl")),
            Source(Path("/b.json"), take="first:3"),
            Source("hub://ORG/NAME", split="train", weight=2.0),
        )
    )


def test_every_key_of_a_source():
    full = {
        "path": "a", "format": "llava", "name": "n", "media_root": "m", "remap": {"x/": "y/"},
        "columns": {"image": "i"}, "options": {"min_margin": 2},
        "subset": "s", "split": "t", "revision": "r", "coordinates": "unit",
        "licence": "CC", "take": "end:10%", "weight": 0.5, "on_bad": "quarantine", "max_bad_rate": 0,
    }  # fmt: skip
    (source,) = read_mixture([full], root="/d").sources
    assert source == Source(**full | {"path": Path("/d/a"), "media_root": Path("/d/m"), "max_bad_rate": 0.0})


def test_what_holds_for_all_and_what_stands_nearer():
    data = {
        "sources": ["a", {"path": "b", "media_root": "own", "on_bad": "error"}],
        "temperature": 2, "epoch_rows": 10, "media_root": "m", "remap": {"x": "y"}, "max_bad_rate": 0.5,
    }  # fmt: skip
    options = read_mixture(data, root="/d", shared={"on_bad": "quarantine", "max_bad_rate": 0.1})
    assert (options.temperature, options.epoch_rows) == (2.0, 10)
    a, b = options.sources
    assert (a.media_root, a.on_bad, a.max_bad_rate, a.remap) == (Path("/d/m"), "quarantine", 0.5, {"x": "y"})
    assert (b.media_root, b.on_bad, b.max_bad_rate) == (Path("/d/own"), "error", 0.5)


def test_a_mixture_file_is_relative_to_itself(tmp_path):
    inner = {"sources": ["a.jsonl"], "temperature": 3.0, "media_root": "pictures"}
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mix.yaml").write_text(yaml.safe_dump(inner))
    options = read_mixture({"mixture": "sub/mix.yaml"}, root=tmp_path)
    assert options.temperature == 3.0
    assert options.sources[0].path == tmp_path / "sub" / "a.jsonl"
    assert options.sources[0].media_root == tmp_path / "sub" / "pictures"
    beside = read_mixture({"mixture": "sub/mix.yaml", "temperature": 1, "media_root": "mine"}, root=tmp_path)
    assert beside.temperature == 1.0 and beside.sources[0].media_root == tmp_path / "mine"
    (tmp_path / "list.yaml").write_text("- a\n- {path: b, weight: 1}\n")
    assert [source.weight for source in read_mixture({"mixture": "list.yaml"}, root=tmp_path).sources] == [None, 1]


def test_a_mixture_of_llava_next_as_it_is(tmp_path):
    (tmp_path / "next.yaml").write_text(
        """
datasets:
  - json_path: /data/a.json
    sampling_strategy: all            # as their scripts comment it
  - json_path: /data/b.jsonl
    sampling_strategy: "first:1000"
  - json_path: /data/{c,d}/{e, f}.json
    sampling_strategy: random:20%
  - json_path: rel.json
"""
    )
    sources = read_mixture({"mixture": "next.yaml", "media_root": "/images"}, root=tmp_path).sources
    assert [(str(source.path), source.take) for source in sources] == [
        ("/data/a.json", "all"),
        ("/data/b.jsonl", "first:1000"),
        ("/data/c/e.json", "random:20%"),
        ("/data/c/f.json", "random:20%"),
        ("/data/d/e.json", "random:20%"),
        ("/data/d/f.json", "random:20%"),
        (str(tmp_path / "rel.json"), "all"),
    ]
    assert {source.media_root for source in sources} == {Path("/images")}
    assert expand_braces("plain.json") == ["plain.json"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("rows.jsonl", "data = 'rows.jsonl'"),
        ([], r"data = \[\]"),
        ({"sources": []}, r"data: sources = \[\]"),
        ({"sources": ["a"], "mixture": "b"}, "data = {"),
        ({"temperature": 2}, "data = {"),
        ([3], "data: 3"),
        ([{"weight": 2}], "data: {'weight': 2}"),
        ([{"path": "a", "wieght": 2}], "(?s)data: a: unknown key 'wieght'.*write `weight`"),
        ({"sources": ["a"], "temprature": 2}, "(?s)data: unknown key 'temprature'.*write `temperature`"),
        ({"datasets": [{"json_path": "a", "sampling": "all"}]}, "(?s)unknown key 'sampling'.*`sampling_strategy`"),
        ({"datasets": [{"path": "a"}]}, "datasets: {'path': 'a'}"),
        ([{"path": "a", "first": 0}], "data: a: first = 0"),
        ([{"path": "a", "first": 3, "take": "all"}], "first = 3 beside `take`"),
        ([{"path": "a", "take": "some"}], "take = 'some'"),
        ([{"path": "a", "weight": 0}], "data: a: weight = 0"),
        ([{"path": "a", "weight": True}], "weight = True"),
        ([{"path": "a", "max_bad_rate": 2}], "data: a: max_bad_rate = 2"),
        ([{"path": "a", "on_bad": "ignore"}], "on_bad = 'ignore'"),
        ([{"path": "a", "coordinates": "inches"}], "coordinates = 'inches'"),
        ([{"path": "a", "remap": "x"}], "remap = 'x'"),
        ([{"path": "a", "media_root": 3}], "media_root = 3"),
        ([{"path": "a", "name": 3}], "name = 3"),
        ({"sources": ["a"], "temperature": 0}, "temperature = 0"),
        ({"sources": ["a"], "epoch_rows": 1.5}, "epoch_rows = 1.5"),
        ({"mixture": "none.yaml"}, "none.yaml is not there"),
        ({"mixture": 3}, "mixture: 3 is not there"),
    ],
)
def test_wrong_data(data, message):
    with pytest.raises(OptionError, match=message):
        read_mixture(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "mix.yaml = 3"),
        ("a: [", "mix.yaml"),
        ("mixture: mix.yaml", "mix.yaml = "),
        ("sources: [{}]", "mix.yaml: {}"),
    ],
)
def test_wrong_mixture_files(tmp_path, text, message):
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(OptionError, match=message):
        read_mixture({"mixture": "mix.yaml"}, root=tmp_path)
