"""Media that the sides of a pair share are the repeated ones, of every kind: tiles, sounds, videos, with questions."""

import json
from pathlib import Path

import pytest
import torch

from mllm.data.collate import PackingCollator, PaddingCollator
from mllm.data.collate_pairs import PairCollator
from mllm.data.contrasts import Contrast
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.data.pairs import Pairs
from mllm.models.segment_attention import isolate_segments
from mllm.testing import tiny_model, tiny_tokenizer
from mllm.testing_media import save_tiny_media_rows

ASKING = {
    "type": "instruct_qformer", "layers": 2, "hidden_size": 8, "heads": 2, "intermediate_size": 10, "num_queries": 3,
    "dropout": 0.0,
}  # fmt: skip
TOWERS = {
    "tiles": {"image": {"tiles": "llava_next"}},
    "tiles merged": {"image": {"tiles": {"type": "internvl", "max_tiles": 6}, "connector": "patch_merge"}},
    "images, sounds and videos": {"audio": {}, "video": {"connector": "linear", "frames": "uniform:3"}},
    "a connector that reads questions": {"image": {"connector": ASKING}},
}
CONTENTS = {"images, sounds and videos": ["iav", "vi", "a", "", "ai"]}
RETRIEVED = Contrast("retrieved")


@pytest.fixture(params=TOWERS, scope="module")
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model_and_examples(kind, tmp_path_factory):
    root = tmp_path_factory.mktemp("media")
    towers = TOWERS[kind]
    if "questions" in kind:
        tiny_tokenizer("gpt_neox").save_pretrained(root / "words")
        towers = {"image": {"connector": {**ASKING, "tokenizer": str(root / "words")}}}
    model, processor = tiny_model(root / "parts", **towers)
    for parameter in model.model.image_tower.connector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # queries and words that differ enough to be told apart
    contents = CONTENTS.get(kind, ["ii", "i", "iti", "i"])
    rows = open_mixture(read_mixture([str(_save_pairs(root, contents))]))
    isolate_segments(model, longest=400)
    return model.eval(), Pairs(rows, processor, contrast=RETRIEVED)


@pytest.mark.parametrize("texts", [PaddingCollator, PackingCollator])
def test_shared_equals_repeated(model_and_examples, texts):
    """Log-probabilities of all sides, and gradients of the connectors; also with what a first forward has encoded."""
    model, examples = model_and_examples
    found = {}
    for is_shared in (True, False):
        collate = PairCollator(texts(examples.processor), contrast=RETRIEVED, shares_media=is_shared)
        found[is_shared] = _log_probs_and_gradients(
            model, collate([examples[number] for number in range(len(examples))])
        )
    _assert_same(found[True], found[False])


def test_what_a_frozen_encoder_gave_serves_a_second_forward(model_and_examples, kind):
    model, examples = model_and_examples
    collate = PairCollator(PaddingCollator(examples.processor), contrast=RETRIEVED, shares_media=True)
    batch = collate([examples[number] for number in range(len(examples))])
    for tower in model.model.towers.values():
        if tower.encoder is not None:
            tower.encoder.requires_grad_(False)
    with torch.no_grad():
        first = model(**batch, returns_log_probs=True, use_cache=False)
    assert first.encoder_features
    values = ("pixel_values", "pixel_values_videos", "input_features")
    rest = {name: value for name, value in batch.items() if name not in values}
    second = model(**rest, **first.encoder_features, returns_log_probs=True, use_cache=False)
    torch.testing.assert_close(second.log_probs, first.log_probs, rtol=0, atol=1e-5)
    assert not second.encoder_features
    for tower in model.model.towers.values():
        tower.requires_grad_(True)


def _log_probs_and_gradients(model, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    found = model(**batch, returns_log_probs=True, use_cache=False).log_probs
    (found * torch.linspace(-1, 1, len(found))).sum().backward()
    connectors = {name: one.grad for name, one in model.named_parameters() if ".connector." in name}
    return found.detach(), {name: grad.clone() for name, grad in connectors.items() if grad is not None}


def _assert_same(found, expected) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert found[1].keys() == expected[1].keys() and found[1]
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def _save_pairs(root: Path, contents: list[str]) -> Path:
    """Pairs about these media, each contrasted with others of the same kinds."""
    own, others = (
        _rows(save_tiny_media_rows(root / name, [*["t"] * shift, *contents]))[shift:]
        for name, shift in (("own", 0), ("other", len(contents)))
    )
    path = root / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, (row, other) in enumerate(zip(own, others, strict=True)):
            media, contrast = (
                [{**item, "path": f"{folder}/{item['path']}"} for item in one["media"]]
                for folder, one in (("own", row), ("other", other))
            )
            if not media:
                continue
            answers = {"chosen": {"content": f"a red {number}"}, "rejected": {"content": "a blue 7, I think"}}
            fields = {"id": number, "messages": row["messages"][:1], "media": media, "contrast": contrast}
            file.write(json.dumps(fields | answers) + "\n")
    return path


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
