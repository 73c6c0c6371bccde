"""A form is found out only where precisely one is possible."""

import importlib
import pkgutil

import pytest

from mllm.data import importers
from mllm.data.importers import IMPORTERS, detect_format
from mllm.data.importers.base import Importer, Record
from mllm.data.sources import Source
from mllm.errors import OptionError


def turns(asked):
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": "A"}]


def chat(asked):
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": "A"}]


def side(words):
    return [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": words}]


PUBLISHED = {
    "llava": {"id": 1, "image": "a.jpg", "conversations": turns("<image>\nQ")},
    "conversational": {"images": ["a"], "messages": chat([{"type": "image"}, {"type": "text", "text": "Q"}])},
    "cauldron": {"images": ["a"], "texts": [{"user": "Q", "assistant": "A", "source": "s"}]},
    "webdataset": {"__key__": "0", "jpg": "a", "txt": "A"},
    "openai": {"messages": chat([{"type": "image_url", "image_url": {"url": "a"}}])},
    "llama_factory": {"instruction": "Q", "input": "", "output": "A"},
    "ms_swift": {"messages": chat("<image>Q"), "images": ["a"]},
    "videochat": {"video": "v.mp4", "QA": [{"q": "Q", "a": "A"}]},
    "videoinstruct": {"q": "Q", "a": "A", "video_id": "v_x"},
    "audiocaps": {"audiocap_id": "1", "youtube_id": "x", "start_time": "30", "caption": "Wind"},
    "clotho": {"file_name": "a.wav"} | {f"caption_{number}": "Wind" for number in range(1, 6)},
    "wavcaps": {"title": "t", "id": "1", "duration": 2.5, "audio": "wavs/1.flac", "caption": "Wind"},
    "openaqa": {"instruction": "Q", "input": "", "audio_id": "a", "dataset": "d", "task": "t", "output": "A"},
    "preference_trl": {"images": ["a"], "prompt": chat("Q")[:1], "chosen": chat("")[1:], "rejected": chat("")[1:]},
    "re_align": {"image": "a", "retrieved_image": "b", "chosen": side("A"), "rejected": side("B")},
    "rlhf_v": {"ds_name": "d", "image": "a", "text": "{}", "origin_dataset": "o", "origin_split": "{}"}
    | {"idx": 1, "image_path": "p"},
    "rlaif_v": {"ds_name": "d", "image": "a", "question": "Q", "chosen": "A", "rejected": "B"}
    | {"origin_dataset": "o", "origin_split": "{}", "idx": 1, "image_path": "p"},
    "vlfeedback": {"id": "1", "prompt": "Q", "models": ["m"], "completions": [], "img_path": "a"},
    "mpo": {"id": 1, "image": "a", "question": "<image>\nQ", "chosen": "A", "rejected": "B"},
    "mdpo": {"img_path": "a", "prompt": "<image>Q", "chosen": "A", "rejected": "B"},
    "mllm": {"id": "1", "messages": chat("Q"), "media": [{"kind": "image", "path": "a"}]},
}
NEVER_FOUND_OUT = {"column_map"}


def detect(*records, **source):
    return detect_format(
        [Record(fields, "", n) for n, fields in enumerate(records)], Source("data.json", **source)
    ).name


@pytest.mark.parametrize("name", PUBLISHED)
def test_of_all_importers_exactly_one_matches(name):
    source = Source("data.json")
    assert [other for other, importer in IMPORTERS.items() if importer.matches(PUBLISHED[name], source)] == [name]
    assert detect(PUBLISHED[name]) == name


def test_the_table_holds_every_importer_of_the_package():
    modules = [
        importlib.import_module(f"{importers.__name__}.{info.name}")
        for info in pkgutil.iter_modules(importers.__path__)
    ]
    found = [value for module in modules for key, value in vars(module).items() if isinstance(value, Importer)]
    assert sorted(importer.name for importer in found) == sorted(IMPORTERS)
    assert {*PUBLISHED, *NEVER_FOUND_OUT} == set(IMPORTERS)


def test_no_form_matches_odd_records():
    source = Source("data.json")
    odd = (
        None,
        3,
        "text",
        [],
        [[]],
        [None],
        {},
        {"a": None},
        {1: 2},
        dict.fromkeys(("messages", "conversations", "texts")),
    )
    for importer in IMPORTERS.values():
        assert not any(importer.matches(fields, source) for fields in odd), importer.name
        for fields in PUBLISHED.values():  # nor raises where the values are others
            for value in (None, 3, "", [], [None], {}, [[]], [{}]):
                importer.matches(dict.fromkeys(fields, value), source)


def test_conversations_of_texts_alone_have_the_form_of_those_around_them():
    plain, plain_turns = {"messages": chat("Q")}, {"conversations": turns("Q")}
    assert detect(plain) == "conversational" and detect(plain_turns) == "llava"
    for name in ("ms_swift", "openai", "conversational", "mllm"):
        assert detect(plain, PUBLISHED[name], plain) == name
    assert detect(plain | {"id": "1", "media": []}) == "mllm"
    assert detect(plain_turns, PUBLISHED["llava"]) == "llava"


def test_no_form_or_several():
    with pytest.raises(OptionError, match=r"no form.*the first 1 records have the keys question, picture") as error:
        detect({"question": "Q", "picture": "a"})
    assert "format:" in error.value.do and "llava" in error.value.do
    with pytest.raises(OptionError, match=r"llava \(1 records\), cauldron \(2 records\)"):
        detect(PUBLISHED["llava"], PUBLISHED["cauldron"], PUBLISHED["cauldron"])
    with pytest.raises(OptionError, match="list in place of an object"):
        detect([1])
    with pytest.raises(OptionError, match="the first 0 records"):
        detect()


def test_a_named_format_is_not_found_out():
    assert detect({"question": "Q"}, format="column_map") == "column_map"
    with pytest.raises(OptionError, match="format = 'lava'"):
        detect(format="lava")
    with pytest.raises(OptionError, match="options colour"):
        detect(format="llava", options={"colour": 1})
