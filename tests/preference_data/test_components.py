"""Components by name: what each needs, and the facts by which results are taken up again."""

import json
import shutil

import pytest

from mllm.errors import OptionError
from mllm.preference_data.acceptance import ModelSimilarity
from mllm.preference_data.arguments import ConstructArguments
from mllm.preference_data.completer import EndpointCompleter, ForcedCompleter, InstructedCompleter
from mllm.preference_data.components import load_components
from mllm.preference_data.construct import construct_pairs, open_rows, work_directory
from mllm.preference_data.embedders import ModelEmbedder
from mllm.preference_data.masker import EndpointMasker, RuleMasker
from mllm.testing_constructions import described_row, save_described_rows


@pytest.fixture
def load(tmp_path, assembled):
    """Make components of options."""
    source = save_described_rows(tmp_path, [described_row(number) for number in range(6)], num_images=6)
    opened = open_rows(source)

    def make(**options):
        given = {"rows": str(source.path), "out": str(tmp_path / "pairs"), "model": str(assembled), **options}
        arguments = ConstructArguments(**given)
        return opened, arguments, load_components(arguments, opened, work=work_directory(tmp_path / "pairs"))

    return make


def test_all_at_hand(load):
    _, _, components = load()
    assert isinstance(components.masker, RuleMasker) and isinstance(components.embedder, ModelEmbedder)
    assert isinstance(components.completer, ForcedCompleter) and isinstance(components.similarity, ModelSimilarity)
    assert components.keeps_each == frozenset() and components.counts == {}
    assert components.completer.model is components.embedder.model is components.similarity.model
    assert isinstance(load(completer="instructed")[2].completer, InstructedCompleter)
    assert len(json.dumps(components.facts)) < 2000  # and JSON can hold them


def test_pairs_through_an_endpoint(load, serve, tmp_path):
    def reply(body, number):
        content = body["messages"][-1]["content"]
        if isinstance(content, str):  # the masker's question
            return content.rpartition("\n\n")[2].replace("table", "[MASK]")
        return content[-1]["text"].rpartition("\n\n")[2].replace("[MASK]", "floor under a lamp")

    server = serve(reply)
    options = {"masker": "endpoint", "completer": "endpoint", "endpoint": server.url, "endpoint_model": "big"}
    opened, arguments, components = load(**options, masker_model="small", tau=1.0, top_k=2)
    assert isinstance(components.masker, EndpointMasker) and isinstance(components.completer, EndpointCompleter)
    assert components.keeps_each == {"masker", "completer"}
    report = construct_pairs(opened, tmp_path / "pairs", components=components, options=arguments.construction)
    assert report["pairs"] == 6
    assert sorted(body["model"] for body in server.bodies) == ["big"] * 6 + ["small"] * 6
    assert components.counts["masker"]["answers"] == components.counts["completer"]["answers"] == 6
    rows = [json.loads(line) for line in (tmp_path / "pairs/rows.jsonl").read_text().splitlines()]
    assert all(row["rejected"]["content"].endswith("on the floor under a lamp.") for row in rows)
    assert "Bearer" not in (tmp_path / "pairs/recipe.json").read_text()


def test_facts_are_those_of_the_weights_and_not_of_the_place(load, assembled, tmp_path):
    facts = load()[2].facts["completer"]
    shutil.copytree(assembled, tmp_path / "model")
    (tmp_path / "model/run.json").write_text("{}")
    assert load(model=str(tmp_path / "model"))[2].facts["completer"]["sha256"] == facts["sha256"]
    weights = tmp_path / "model/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert load(model=str(tmp_path / "model"))[2].facts["completer"]["sha256"] != facts["sha256"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masker": "luck"}, "one of rules, endpoint"),
        ({"completer": "luck"}, "one of forced, instructed, endpoint"),
        ({"similarity": "luck"}, "one of model, sentences"),
        ({"model": None}, "no --model"),
        ({"completer": "endpoint"}, "endpoint = None"),
        ({"completer": "endpoint", "endpoint": "http://localhost:1/v1"}, "endpoint_model = None"),
    ],
)
def test_what_is_missing_is_said(load, options, message):
    with pytest.raises(OptionError, match=message):
        load(**options)
