"""A construction of pairs that is killed anywhere goes on to the same files, and asks nobody for what it was given."""

import pytest

from mllm.preference_data.construct import construct_pairs, open_rows
from mllm.preference_data.construction import Construction
from mllm.preference_data.retriever import Retrieval
from mllm.testing_constructions import KilledError, StandIns, described_row, save_described_rows

OPTIONS = Construction(
    tau=0.8, retrieval=Retrieval(top_k=3), batch_size=5, portion=3, chunk=5, search="numpy", examples=3
)


def say(number, masked):
    """In several rounds: under odd images the answer stays as it was."""
    return masked.text if number % 2 else masked.filled(["a thing"] * len(masked.phrases))


def build(opened, out, stand_ins, keeps_each):
    construct_pairs(opened, out, components=stand_ins.components(keeps_each=keeps_each), options=OPTIONS)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("keeps_each", [("masker", "completer"), ()], ids=["endpoints", "models at hand"])
def test_killed_anywhere_it_goes_on_to_the_same_pairs(tmp_path, keeps_each, step):
    opened = open_rows(save_described_rows(tmp_path, [described_row(number) for number in range(12)]))
    whole = StandIns(life=10**6, say=say)
    expected = build(opened, tmp_path / "whole", whole, keeps_each)
    life = 10**6 - whole.life
    assert life > 40
    for end in range(0, life, step):
        out = tmp_path / f"killed-{end}"
        first, second = StandIns(end, say), StandIns(say=say)
        with pytest.raises(KilledError):
            build(opened, out, first, keeps_each)
        assert not out.exists()
        assert build(opened, out, second, keeps_each) == expected
        if keeps_each:
            assert sorted(first.masked + second.masked) == sorted(whole.masked)
            assert sorted(first.completed + second.completed) == sorted(whole.completed)
