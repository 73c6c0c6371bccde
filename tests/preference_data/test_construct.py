"""A construction: pairs as the paper has them, whatever kills it on the way; what cannot be used is counted."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from PIL import Image

from mllm.data.blobs import read_media_bytes
from mllm.data.contrasts import RETRIEVED, Contrast, shown_by
from mllm.data.indexing.index import open_index
from mllm.data.mixture_file import read_mixture
from mllm.data.schema import PreferenceRow
from mllm.data.sources import Source
from mllm.errors import CheckpointError, OptionError
from mllm.preference_data.answered import NO_ANSWER, NOT_ONE_IMAGE, OWN_MEDIA
from mllm.preference_data.construct import construct_pairs, open_rows
from mllm.preference_data.construction import Construction
from mllm.preference_data.masker import RuleMasker
from mllm.preference_data.outcomes import NO_NEIGHBOUR, NONE_ACCEPTED, UNREADABLE
from mllm.preference_data.phrases import BAD_REPLY, EMPTY, NO_PHRASE, TOO_SIMILAR, UNANSWERED, UNCHANGED, Masked
from mllm.preference_data.retriever import Retrieval
from mllm.testing_constructions import WORDS, StandIns, described_row, overlap, save_described_rows


@pytest.fixture
def opened(tmp_path):
    """Twelve rows about twelve images."""
    return open_rows(save_described_rows(tmp_path, [described_row(number) for number in range(12)]))


OPTIONS = Construction(
    tau=0.8, retrieval=Retrieval(top_k=3), batch_size=5, portion=3, chunk=5, search="numpy", examples=3
)


def build(opened, out, parts, options=OPTIONS, **components):
    return construct_pairs(opened, out, components=parts.components(**components), options=options)


def read_rows(out):
    (source,) = read_mixture({"mixture": str(out / "mixture.yaml")}).sources
    return list(open_index(source))


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_pairs_are_what_the_paper_says(opened, tmp_path):
    report = build(opened, tmp_path / "pairs", StandIns())
    rows = read_rows(tmp_path / "pairs")
    assert report["pairs"] == len(rows) == 12 and all(isinstance(row, PreferenceRow) for row in rows)
    for row in rows:
        number = int(row.id)
        made = row.meta["re_align"]
        retrieved = int(row.contrast[0].path.stem)
        assert retrieved != number and row.media[0].path == tmp_path / f"images/{number}.png"
        assert row.chosen.content == f"There is {WORDS[number % 7]} on the table."
        assert row.rejected.content == masked_and_filled(row.chosen.content, WORDS[retrieved % 7])
        assert made["similarity"] == pytest.approx(overlap(row.chosen.content, row.rejected.content), abs=1e-6)
        assert made["similarity"] < 0.8
        assert row.meta["note"] == number and row.source == "world"
        assert [message["role"] for message in row.messages] == ["user"]
        assert shown_by(row, "contrast", Contrast(RETRIEVED))[0].item == row.contrast[0]
    recipe = json.loads((tmp_path / "pairs/recipe.json").read_text())
    assert (recipe["records"], recipe["rows"], recipe["licence"]) == (12, 12, "CC0")


def masked_and_filled(text, words):
    ((_, masked),) = RuleMasker().mask([text])
    return masked.filled([words] * len(masked.phrases))


def test_the_next_image_is_tried_until_one_is_accepted(opened, tmp_path):
    def say(number, masked):
        return masked.text if number % 2 else masked.filled(["a thing"] * len(masked.phrases))

    report = build(opened, tmp_path / "pairs", StandIns(say=say))
    rows = {int(row.id): row for row in read_rows(tmp_path / "pairs")}
    everything = construct_neighbours(opened, tmp_path)
    for number, near in enumerate(everything):
        even = [rank for rank, image in enumerate(near, start=1) if image % 2 == 0]
        if even:
            made = rows[number].meta["re_align"]
            assert made["rank"] == even[0] and int(rows[number].contrast[0].path.stem) == near[even[0] - 1]
        else:
            assert number not in rows
    missing = 12 - len(rows)
    assert report["rejected_rows"] == ({NONE_ACCEPTED: missing} if missing else {})
    assert set(report["rejected_completions"]) == {UNCHANGED}
    assert report["completions"] == len(rows) + sum(report["rejected_completions"].values())


def construct_neighbours(opened, folder):
    """The three nearest images of each, by brute force."""
    vectors = StandIns().embed([Image.open(item.path).convert("RGB") for item in opened.images]).double().numpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T - 9 * np.eye(len(vectors))
    return np.argsort(-cosines, axis=1)[:, :3].tolist()


def test_chunks_and_portions_change_nothing(opened, tmp_path):
    build(opened, tmp_path / "few", StandIns())
    build(opened, tmp_path / "all", StandIns(), dataclasses.replace(OPTIONS, chunk=100, portion=100))
    few, everything = contents(tmp_path / "few"), contents(tmp_path / "all")
    assert few.pop("recipe.json") != everything.pop("recipe.json")
    assert few == everything


def test_another_tau_takes_up_what_it_does_not_touch(opened, tmp_path):
    def say(number, masked):
        return masked.filled(["a thing " * (number % 5 + 1)] * len(masked.phrases))

    first = build(opened, tmp_path / "pairs", StandIns(say=say))
    tau = first["similarity"]["median"]
    (tmp_path / "pairs").rename(tmp_path / "first")
    stricter = StandIns(say=say)
    report = build(opened, tmp_path / "pairs", stricter, dataclasses.replace(OPTIONS, tau=tau))
    assert 0 < report["rejected_completions"][TOO_SIMILAR] < report["completions"] > first["completions"] == 12
    assert stricter.masked == [] and stricter.num_embedded == 0
    assert len(stricter.completed) == report["completions"] - 12
    assert report["rejected_completions"] == {TOO_SIMILAR: report["completions"] - report["pairs"]}
    other = StandIns(say=say)
    (tmp_path / "pairs").rename(tmp_path / "second")
    build(opened, tmp_path / "pairs", other, dataclasses.replace(OPTIONS, retrieval=Retrieval(top_k=2)))
    assert other.masked == [] and other.num_embedded == 0 and other.completed != []


def test_rows_without_an_answer_are_asked_again(opened, tmp_path):
    deaf = ("There is a green box on the table.", 7)
    first = StandIns(unanswered=deaf)
    with pytest.raises(OptionError, match=r"\d of 12 rows of which an endpoint gave no answer"):
        build(opened, tmp_path / "pairs", first)
    second, whole = StandIns(), StandIns()
    build(opened, tmp_path / "pairs", second)
    build(opened, tmp_path / "whole", whole)
    assert contents(tmp_path / "pairs") == contents(tmp_path / "whole")
    assert second.masked == ["There is a green box on the table."] * 2  # rows 2 and 9
    assert sorted(first.completed + second.completed) == sorted(whole.completed)


def test_rows_without_an_answer_can_be_left_out(opened, tmp_path):
    options = dataclasses.replace(OPTIONS, on_unanswered="reject")
    report = build(opened, tmp_path / "pairs", StandIns(unanswered=("There is a green box on the table.",)), options)
    assert report["rejected_rows"] == {UNANSWERED: 2} and report["pairs"] == 10


def test_what_cannot_be_used_is_counted(tmp_path):
    two = described_row(1)
    two["messages"][0]["content"].insert(0, {"type": "image"})
    text = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "There is a cup."}]
    question = [described_row(0)["messages"][0]]
    sides = {"messages": question, "chosen": {"content": "There is a cup."}, "rejected": {"content": "No."}}
    own = described_row(
        3, **sides | {"chosen": {"content": "x", "media": [{"kind": "image", "path": "images/4.png"}]}}
    )
    rows = [
        described_row(0),
        two | {"media": [{"kind": "image", "path": "images/1.png"}] * 2},
        described_row(2, messages=text, media=[]),
        own,
        described_row(4, **sides),
        described_row(5, messages=[*described_row(5)["messages"], {"role": "user", "content": "And?"}]),
        described_row(6, messages=[*question, {"role": "assistant", "content": " "}]),
        described_row(7, messages=[*question, {"role": "assistant", "content": "Yes, it is."}]),
        described_row(8),
    ]
    source = save_described_rows(tmp_path, rows)
    damaged = tmp_path / "images/8.png"
    damaged.write_bytes(damaged.read_bytes()[:-60])

    def say(number, masked):
        return "" if "cup." in masked.text else masked.filled(["a thing"] * len(masked.phrases))

    parts = StandIns(say=say)
    parts.mask = lambda texts: ((i, Masked(t, (), NO_PHRASE) if "Yes" in t else m) for (i, m), t in zip(RuleMasker().mask(texts), texts))  # fmt: skip  # noqa: E501, B905
    report = build(open_rows(source), tmp_path / "pairs", parts)
    assert report["rejected_rows"] == {
        NOT_ONE_IMAGE: 2, OWN_MEDIA: 1, NONE_ACCEPTED: 1, NO_ANSWER: 2, NO_PHRASE: 1, UNREADABLE: 1
    }  # fmt: skip
    assert report["rejected_completions"] == {EMPTY: 3} and report["pairs"] == 1


def test_a_lonely_image_has_nothing_to_be_retrieved(tmp_path):
    opened = open_rows(save_described_rows(tmp_path, [described_row(0)]))
    with pytest.raises(OptionError, match=f"no pair of 1 rows: .*{NO_NEIGHBOUR}"):
        build(opened, tmp_path / "pairs", StandIns())
    assert not (tmp_path / "pairs").exists()


def test_images_of_rows_that_are_not_taken_can_be_retrieved(tmp_path):
    source = save_described_rows(tmp_path, [described_row(number) for number in range(12)])
    opened = open_rows(dataclasses.replace(source, take="first:2"))
    assert build(opened, tmp_path / "pairs", StandIns())["rows"] == 2
    assert any(int(row.contrast[0].path.stem) > 1 for row in read_rows(tmp_path / "pairs"))


def test_embedded_images_become_files_beside_the_rows(tmp_path):
    save_described_rows(tmp_path, [])
    rows = [
        {
            "image": {"bytes": (tmp_path / f"images/{number}.png").read_bytes(), "path": f"{number}.png"},
            "question": "What is there?",
            "chosen": f"There is {WORDS[number % 7]} on the table.",
            "rejected": "Nothing.",
            "ds_name": "RLAIF-V", "origin_dataset": "", "origin_split": "{}", "idx": str(number), "image_path": "",
        }
        for number in range(6)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    opened = open_rows(Source(tmp_path / "rows.parquet", format="rlaif_v"))

    def say(number, masked):
        return masked.filled(["a thing"] * len(masked.phrases))

    build(opened, tmp_path / "pairs", StandIns(say=say))
    found = read_rows(tmp_path / "pairs")
    assert len(found) == 6
    for number, row in enumerate(found):
        assert read_media_bytes(row.media[0]).read_bytes() == rows[number]["image"]["bytes"]
        assert row.media[0].path.is_relative_to(tmp_path / "pairs/embedded") and row.contrast[0] != row.media[0]


def test_nothing_is_overwritten_and_nobody_is_disturbed(opened, tmp_path):
    (tmp_path / "pairs.work").mkdir()
    with FileLock(str(tmp_path / "pairs.work/lock")), pytest.raises(OptionError, match="in use by another process"):
        build(opened, tmp_path / "pairs", StandIns())
    build(opened, tmp_path / "pairs", StandIns())
    with pytest.raises(CheckpointError, match="exists already"):
        build(opened, tmp_path / "pairs", StandIns())


def test_rows_without_images(tmp_path):
    text = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "There is a cup."}]
    with pytest.raises(OptionError, match="no row has an image"):
        open_rows(save_described_rows(tmp_path, [described_row(0, messages=text, media=[])]))


@pytest.mark.parametrize("options", [{"tau": 0.0}, {"chunk": 0}, {"on_unanswered": "shrug"}])
def test_wrong_options(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        Construction(**options)


def test_an_endpoint_on_a_bad_day(opened, tmp_path, serve):
    """It hangs up, talks nonsense and then is gone; what it said before is not asked for again."""
    from mllm.errors import EndpointError
    from mllm.preference_data.completer import EndpointCompleter
    from mllm.preference_data.endpoint import Endpoint

    is_gone = False

    def reply(body, number):
        if is_gone:
            return 503
        if number % 5 == 3:
            return {"body": b"no JSON"}
        text = body["messages"][-1]["content"][-1]["text"].rpartition("\n\n")[2]
        return text.replace("[MASK]", "a thing") if number % 5 else "[MASK] again"

    server = serve(reply)

    def components():
        endpoint = Endpoint(server.url, model="m", tries=2, pause=0.001, concurrency=1, most_failures=2, timeout=20)
        return dataclasses.replace(StandIns().components(), completer=EndpointCompleter(endpoint))

    options = dataclasses.replace(OPTIONS, chunk=12, portion=12)
    construct_pairs(opened, tmp_path / "whole", components=components(), options=options)
    asked = len(server.bodies)
    for end in (3, asked // 2):
        out, before = tmp_path / f"pairs-{end}", len(server.bodies)
        server.reply = lambda body, number, last=before + end: 503 if number >= last else reply(body, number - last)
        with pytest.raises(EndpointError, match="503"):
            construct_pairs(opened, out, components=components(), options=options)
        server.reply = lambda body, number: reply(body, 1)
        kept = sum(path.read_text().count("\n") for path in out.with_name(f"{out.name}.work").glob("completer-*/*"))
        before = len(server.bodies)
        report = construct_pairs(opened, out, components=components(), options=options)
        assert len(server.bodies) - before == report["completions"] - kept


def test_half_a_letter_is_no_answer(opened, tmp_path):
    """An endpoint may spell one in JSON, and no file takes it."""
    report = build(
        opened, tmp_path / "pairs", StandIns(say=lambda number, masked: "\ud83d" if number % 2 else "A thing.")
    )
    assert report["rejected_completions"] == {BAD_REPLY: report["completions"] - report["pairs"]}
    assert {row.rejected.content for row in read_rows(tmp_path / "pairs")} == {"A thing."}
