"""How alike answers are, and what speaks against a completion."""

import sys
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mllm.errors import OptionError
from mllm.load import load_model, load_processor
from mllm.preference_data.acceptance import ModelSimilarity, SentenceSimilarity, reason_against
from mllm.preference_data.phrases import (
    BAD_REPLY,
    EMPTY,
    MASK_LEFT,
    NO_ROOM,
    REASONS,
    UNCHANGED,
    Completion,
    Masked,
    Phrase,
)
from mllm.testing_checkpoints import save_stock_checkpoint

MASKED = Masked("A red cup.", (Phrase(2, 5),))
PAIRS = [
    ("A red cup.", "A blue cup."),
    ("A red cup.", "There is a green 7 in the top left and a 9 in the middle."),
    ("yes", "no"),
    ("A red cup.", "A red cup."),
]


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        (Completion("A blue cup."), ""),
        (Completion("A red cup."), UNCHANGED),
        (Completion("  a RED cup "), UNCHANGED),
        (Completion(" \n"), EMPTY),
        (Completion("A [MASK] cup."), MASK_LEFT),
        (Completion("A [mask] cup."), MASK_LEFT),
        (Completion("", BAD_REPLY), BAD_REPLY),
        (Completion("", NO_ROOM), NO_ROOM),
    ],
)
def test_reasons(completion, reason):
    assert reason_against(MASKED, completion) == reason
    assert not reason or reason in REASONS


@pytest.fixture(scope="module", params=["ours", "gemma3", "qwen2_5_vl"])
def model(request, talker, tmp_path_factory):
    if request.param == "ours":
        return talker
    path = save_stock_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    return load_model(path).eval(), load_processor(path)


def test_an_answer_is_like_itself_alone(model):
    same, *others = ModelSimilarity(*model).similarities(PAIRS[::-1])
    assert same == pytest.approx(1.0, abs=1e-12) and all(-1 <= value < 1 - 1e-6 for value in others)
    assert len(set(others)) == 3


@pytest.mark.parametrize("centre_on", [(), ("A red cup.", "two dogs", "no")])
def test_a_similarity_depends_on_its_pair_alone(model, centre_on):
    similarity = ModelSimilarity(*model, centre_on=centre_on)
    alone = [similarity.similarities([pair])[0] for pair in PAIRS]
    assert similarity.similarities(PAIRS) == pytest.approx(alone, abs=1e-5)
    assert ModelSimilarity(*model, centre_on=centre_on, batch_size=1).similarities(PAIRS) == pytest.approx(
        alone, abs=1e-5
    )
    assert similarity.similarities([]) == []


def test_it_is_the_cosine_of_mean_hidden_states(model):
    """In float64, from the states that the whole model shows."""
    plain, processor = model

    def mean(text: str) -> torch.Tensor:
        messages = [{"role": "user", "content": "."}, {"role": "assistant", "content": text}]
        ids, weights, _ = processor.encode_chat(messages)
        with torch.no_grad():
            output = plain(input_ids=torch.tensor([ids]), output_hidden_states=True)
        spoken = torch.tensor(weights).bool().nonzero()[:-1, 0]  # without the end of the turn
        return output.hidden_states[-1][0, spoken].double().mean(0)

    centre = torch.stack([mean("two dogs"), mean("no")]).mean(0)
    found = ModelSimilarity(plain, processor, centre_on=["two dogs", "no"]).similarities(PAIRS[:3])
    expected = [torch.cosine_similarity(mean(a) - centre, mean(b) - centre, dim=0).item() for a, b in PAIRS[:3]]
    assert found == pytest.approx(expected, abs=1e-4)


def test_an_adapter_is_heard(talker):
    model, processor = talker
    plain = ModelSimilarity(model, processor).similarities(PAIRS)
    names = [name for name, module in model.named_modules() if name.endswith("q_proj") and "language_model" in name]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=names, init_lora_weights=False))
    try:
        with adapted.disable_adapter():
            assert ModelSimilarity(adapted, processor).similarities(PAIRS) == plain
        assert ModelSimilarity(adapted, processor).similarities(PAIRS) != plain
    finally:
        adapted.unload()


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(OptionError, match="pip install"):
        SentenceSimilarity()


def test_sentence_vectors_are_compared_by_cosine(monkeypatch):
    """Against a double of the library: it is asked once for each text, and never runs a model's code or pickles."""
    asked, made = [], {}

    class SentenceTransformer:
        def __init__(self, name, **options):
            made.update(options, name=name)

        def encode(self, texts, **options):
            asked.append(texts)
            return torch.tensor([[len(text), text.count("e"), 1.0] for text in texts])

    library = ModuleType("sentence_transformers")
    library.SentenceTransformer = SentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    similarity = SentenceSimilarity("some/model", device="cpu")
    found = similarity.similarities(PAIRS)
    vectors = [[torch.tensor([len(t), t.count("e"), 1.0], dtype=torch.float64) for t in pair] for pair in PAIRS]
    assert found == pytest.approx([torch.cosine_similarity(a, b, dim=0).item() for a, b in vectors], abs=1e-9)
    assert len(asked) == 1 and len(set(asked[0])) == len(asked[0]) == 5
    assert made["name"] == "some/model" and made["model_kwargs"] == {"use_safetensors": True}
    assert not made.get("trust_remote_code") and similarity.similarities([]) == []
