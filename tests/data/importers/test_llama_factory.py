import json

import pytest

from mllm.data.importers.base import Drop, ImportProblem
from mllm.data.indexing.index import open_index
from mllm.data.schema import PreferenceRow
from mllm.data.sources import Source
from mllm.errors import OptionError

TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
SFT = {
    "file_name": "data.json",
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "images": "images"},
    "tags": TAGS | {"system_tag": "system"},
}
PAIRS = {
    "file_name": "data.json",
    "formatting": "sharegpt",
    "ranking": True,
    "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"},
}
ALPACA = {"instruction": "Count.", "input": "", "output": "One."}


@pytest.fixture
def info(tmp_path):
    return lambda **entries: (tmp_path / "dataset_info.json").write_text(json.dumps(entries))


def _texts(row):
    return [(message["role"], message["content"]) for message in row.messages]


def test_alpaca_without_a_description(import_rows):
    records = [ALPACA, ALPACA | {"input": "From 3."}]
    first, second = import_rows(records)
    assert _texts(first) == [("user", "Count."), ("assistant", "One.")] and first.id == "00000000"
    assert _texts(second)[0] == ("user", "Count.\nFrom 3.") and second.id == "00000001"


def test_alpaca_with_columns_of_other_names(import_rows, info):
    columns = {"prompt": "q", "response": "a", "system": "s", "history": "h", "images": "pictures"}
    info(mine={"file_name": "data.json", "columns": columns})
    record = {"q": "<image>And this?", "a": "A dog.", "s": "Be brief.", "h": [["<image>What?", "A cat."]]}
    (row,) = import_rows([record | {"pictures": ["a.png", "b.png"]}])
    assert [role for role, _ in _texts(row)] == ["system", "user", "assistant", "user", "assistant"]
    assert row.messages[1]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert [item.path.name for item in row.media] == ["a.png", "b.png"]


def test_columns_replace_all_defaults(import_rows, info):
    info(mine={"file_name": "data.json", "columns": {"prompt": "instruction", "response": "output"}})
    (row,) = import_rows([ALPACA | {"input": "not read"}])
    assert _texts(row)[0] == ("user", "Count.")


def test_sharegpt_with_system_and_media_of_three_kinds(import_rows, info):
    columns = {"messages": "messages", "images": "images", "videos": "videos", "audios": "audios"}
    info(mine=SFT | {"columns": columns})
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<audio>\n<image>Does <video> fit?"},
        {"role": "assistant", "content": "Yes."},
    ]
    record = {"id": 7, "messages": messages, "images": ["a.png"], "videos": ["v.mp4"], "audios": ["s.wav"]}
    (row,) = import_rows([record])
    assert row.id == "7" and [item.kind for item in row.media] == ["audio", "image", "video"]
    assert row.messages[1]["content"] == [
        {"type": "audio"},
        {"type": "image"},
        {"type": "text", "text": "Does "},
        {"type": "video"},
        {"type": "text", "text": " fit?"},
    ]


def test_sharegpt_with_default_tags_and_a_column_for_the_system(import_rows, info):
    columns = {"messages": "conversations", "system": "system"}
    info(mine={"file_name": "data.json", "formatting": "sharegpt", "columns": columns})
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    (row,) = import_rows([{"conversations": turns, "system": "Be brief."}])
    assert _texts(row) == [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho")]


def test_a_pair(import_rows, info):
    info(mine=PAIRS)
    record = {
        "conversations": [{"from": "human", "value": "<image>What?"}],
        "chosen": {"from": "gpt", "value": "A cat."},
        "rejected": {"from": "gpt", "value": "A dog."},
        "images": ["a.png"],
    }
    (row,) = import_rows([record])
    assert isinstance(row, PreferenceRow)
    assert (row.chosen.content, row.rejected.content) == ("A cat.", "A dog.") and row.rejected.media is None
    with pytest.raises(ImportProblem, match="chosen holds a placeholder string"):
        import_rows([record | {"chosen": {"from": "gpt", "value": "<image>"}}])
    with pytest.raises(ImportProblem, match="turns of user, assistant; expected user, .*, user"):
        import_rows([record | {"conversations": [*record["conversations"], record["chosen"]]}])


def test_an_alpaca_pair_of_strings(import_rows, info):
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    info(mine={"file_name": "data.json", "ranking": True, "columns": columns})
    (row,) = import_rows([ALPACA | {"chosen": "One.", "rejected": "Two."}])
    assert _texts(row) == [("user", "Count.")] and row.rejected.content == "Two."


def test_images_in_an_answer_are_targets(import_rows, info):
    info(mine=SFT)
    messages = [{"role": "user", "content": "Draw it."}, {"role": "assistant", "content": "Here: <image>"}]
    (row,) = import_rows([{"messages": messages, "images": ["a.png"]}])
    assert row.messages[1]["content"] == [{"type": "text", "text": "Here: "}, {"type": "image"}]


def test_placeholder_words_without_media_stay_words(import_rows, info):
    info(mine=SFT)
    messages = [{"role": "user", "content": "What is <image>?"}, {"role": "assistant", "content": "A <video>."}]
    (row,) = import_rows([{"messages": messages, "images": []}])
    assert _texts(row) == [("user", "What is <image>?"), ("assistant", "A <video>.")] and row.media == ()


@pytest.mark.parametrize("subset", ["", "first", "second"])
def test_the_entry_is_found_by_file_or_named(import_rows, info, tmp_path, subset):
    info(first={"columns": {"prompt": "a", "response": "b"}}, second=SFT | {"columns": {"messages": "m"}})
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (row,) = import_rows([{"a": "Count.", "b": "One.", "m": turns}], subset=subset)
    assert _texts(row)[0][1] == ("Count." if subset == "first" else "Hi")


def test_the_path_may_be_the_description(import_rows, info, tmp_path):
    info(mine=SFT)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    for source in (
        {"path": f"{tmp_path}/dataset_info.json#mine"},
        {"path": tmp_path / "dataset_info.json", "subset": "mine"},
    ):
        (row,) = import_rows([{"messages": turns}], **source)
        assert _texts(row) == [("user", "Hi"), ("assistant", "Ho")]


def test_what_is_not_learned_from_is_counted(import_rows, info):
    columns = {"messages": "messages", "tools": "tools", "kto_tag": "label"}
    info(mine=SFT | {"columns": columns, "tags": TAGS | {"function_tag": "call"}})
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    with pytest.raises(Drop, match="tools"):
        import_rows([{"messages": turns, "tools": "[...]"}])
    with pytest.raises(Drop, match="KTO"):
        import_rows([{"messages": turns, "label": True}])
    with pytest.raises(Drop, match="tools"):
        import_rows([{"messages": [turns[0], {"role": "call", "content": "{}"}]}])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "the messages are None; .* the columns are id, entry 'mine' names messages, images"),
        ({"messages": []}, r"the messages are \[\]"),
        ({"messages": [{"from": "user"}]}, "expected the keys role and content"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role = 'bot'; expected one of user, assistant, system"),
        ({"messages": [{"role": "user", "content": None}]}, "content = None; expected a text"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "turns of assistant; expected user, assistant"),
        ({"messages": [{"role": "user", "content": "x"}]}, "turns of user; expected user, assistant"),
        (
            {"messages": [{"role": "user", "content": "<image>x"}, {"role": "assistant", "content": "y"}]},
            "<image> in the texts and no column 'images'",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "images": ["a"]},
            "0 strings <image> in the texts and 1 images",
        ),
    ],
)
def test_problems(import_rows, info, record, message):
    info(mine=SFT)
    with pytest.raises(ImportProblem, match=message):
        import_rows([{"id": 1} | record])


@pytest.mark.parametrize(
    ("entries", "source", "message"),
    [
        ({"a": SFT}, {"subset": "b"}, "no entry 'b' .*\n.*one of a"),
        ({"a": SFT, "b": SFT}, {"format": "llama_factory"}, "has the entries a, b"),
        ({"a": SFT | {"formatting": "openai"}}, {"format": "llama_factory"}, "formatting = 'openai'"),
        ({"a": []}, {"format": "llama_factory"}, "holds no entries"),
    ],
)
def test_descriptions_that_do_not_fit(import_rows, info, entries, source, message):
    info(**entries)
    with pytest.raises(OptionError, match=message):
        import_rows([ALPACA], **source)


def test_a_changed_description_makes_another_index(info, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([{"a": "Count.", "b": "One.", "c": "Two."}]))
    answers = []
    for column in "bc":
        info(mine={"file_name": "data.json", "columns": {"prompt": "a", "response": column}})
        index = open_index(Source(tmp_path / "data.json"), cache_dir=tmp_path / "cache")
        answers.append(index[0].messages[1]["content"])
    assert answers == ["One.", "Two."]
