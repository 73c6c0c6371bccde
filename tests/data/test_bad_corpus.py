"""A directory of bad things ends in a list that names each with its reason: no good row lost, no hang, no crash."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from mllm.data.auditing.audit import KINDS, audit_source, kind_of
from mllm.data.auditing.inspection import decode_item
from mllm.data.indexing.index import open_index
from mllm.data.sources import Source
from mllm.errors import MllmError, RowError

_spec = importlib.util.spec_from_file_location("bad_corpus", Path(__file__).with_name("bad_corpus.py"))
bad_corpus = importlib.util.module_from_spec(_spec)
sys.modules["bad_corpus"] = bad_corpus  # dataclasses look their module up
_spec.loader.exec_module(bad_corpus)

PARTS = ("rows", "text", "media", "preference", "llava", "messages", "marked", "arrays", "tables", "tars")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    return {part.name: part for part in bad_corpus.build(root / "corpus")}


@pytest.fixture(scope="module")
def opened(corpus, tmp_path_factory):
    """Opens a part, each once."""
    cache, indexes = tmp_path_factory.mktemp("cache"), {}

    def open_part(name: str):
        if name not in indexes:
            source = Source(**corpus[name].options, on_bad="quarantine", max_bad_rate=1.0)
            indexes[name] = open_index(source, cache_dir=cache)
        return indexes[name]

    return open_part


def test_there_are_many(corpus):
    assert tuple(corpus) == PARTS
    assert sum(len(part.bad) for part in corpus.values()) >= 200
    assert all(part.good for part in corpus.values())


@pytest.mark.parametrize("name", PARTS)
def test_every_bad_thing_is_named_with_its_reason(name, corpus, opened):
    listed, unnamed, wrong = opened(name).bad(), [], []
    for expected in corpus[name].bad:
        entries = [entry for entry in listed if _stands_for(entry, expected.place)]
        if not entries:
            unnamed.append(f"{expected.place}: {expected.about}")
        elif not any(re.search(expected.reason, str(entry), re.IGNORECASE) for entry in entries):
            wrong.append(f"{expected.place}: {expected.about}: wanted {expected.reason!r}, got {entries[0].reason!r}")
    assert not unnamed and not wrong, "\n".join(["not in the list:", *unnamed, "another reason:", *wrong])


@pytest.mark.parametrize("name", PARTS)
def test_nothing_good_is_named(name, corpus, opened):
    part = corpus[name]
    places = [expected.place for expected in part.bad] + part.either
    strangers = [str(entry) for entry in opened(name).bad() if not any(_stands_for(entry, place) for place in places)]
    assert not strangers


@pytest.mark.parametrize("name", PARTS)
def test_the_good_rows_remain(name, corpus, opened):
    index, part = opened(name), corpus[name]
    refused = sum(any(_stands_for(entry, place) for entry in index.bad()) for place in part.either)
    assert len(index) == len(part.good) + len(part.either) - refused
    for position in range(len(index)):
        row = index[position]
        assert row.messages and all(item.height or item.seconds for item in row.media)


@pytest.mark.parametrize("name", PARTS)
def test_without_a_quarantine_it_is_one_message(name, corpus, tmp_path):
    with pytest.raises(MllmError, match="such as") as error:
        open_index(Source(**corpus[name].options), cache_dir=tmp_path)
    assert 1 < len(str(error.value).splitlines()) < 20


def test_too_many_bad_rows_are_an_error(corpus, tmp_path):
    source = Source(**corpus["rows"].options, on_bad="quarantine", max_bad_rate=0.5)
    with pytest.raises(RowError, match=r"at most 50\.00% bad rows"):
        open_index(source, cache_dir=tmp_path)


def test_an_audit_has_a_word_for_every_bad_file(opened):
    words = {kind_of(entry.reason): entry.reason for entry in opened("media").bad()}
    assert "other" not in words, words["other"]
    assert len(words) == len(KINDS) - 1  # nothing here takes too long


def test_an_audit_that_decodes_finds_what_headers_hide(opened):
    audits = [audit_source(opened("media"), decode=decode) for decode in (None, decode_item)]
    refused = [sum(t.count for media in one.media for t in media.refused.values()) for one in audits]
    assert refused[1] - refused[0] == len(bad_corpus.FOUND_BY_DECODING)


def _stands_for(entry, place: str) -> bool:
    """Whether an entry of the list is about a place: its whole id, or a whole word of where it stands."""
    words = f"{entry.id} | {Path(entry.where).name if '/' in entry.where else entry.where} | {entry.where}"
    return bool(re.search(rf"(?<![\w.]){re.escape(place)}(?![\w.])", words))
