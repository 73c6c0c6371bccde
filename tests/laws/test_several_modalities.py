"""Images, sounds, videos and text in any order: each row of a batch is what it is alone, and each medium, too.

The rows have real files, of unequal sizes and lengths. A batch is padded, packed, or the prompts of `generate`.
"""

import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from mllm import load_model
from mllm.data.collate import PackingCollator, PaddingCollator
from mllm.data.examples import Examples
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.errors import RowError
from mllm.inference.generation import generation_config, without_end
from mllm.inference.prompt import encode_prompt, model_inputs
from mllm.models.parts import PartOptions, apply_modes, parts_of
from mllm.models.segment_attention import isolate_segments
from mllm.testing import tiny_model
from mllm.testing_media import KINDS, save_tiny_media_rows

CONTENTS = ("itav", "", "v", "vtati", "avi", "a", "ii", "vv", "tt")
QFORMER = {
    "type": "qformer", "num_queries": 3, "layers": 2, "hidden_size": 16, "heads": 2, "intermediate_size": 32,
    "cross_attention_frequency": 1, "dropout": 0.0,
}  # fmt: skip
TOWERS = {
    "frames one by one": {
        "audio": {},
        "video": {"connector": "linear", "frames": "uniform:3"},
    },
    "pooled frames behind their times": {
        "audio": {"connector": {"type": "pool", "size": 4}},
        "video": {"connector": {"type": "pool", "over": "grid", "size": 2}, "frames": "fps:2:2:8", "timestamps": True},
    },
    "Q-Formers with positions": {
        "audio": {"connector": {**QFORMER, "per": "item", "positions": 3}},
        "video": {"connector": {**QFORMER, "per": "item", "positions": 8}, "frames": "cap:3:8"},
    },
    "frames through the image connector": {
        "image": {"connector": QFORMER},
        "audio": {"connector": "linear"},
        "video": {
            "connector": {**QFORMER, "per": "item", "positions": 8},
            "frames": "cap:3:8",
            "through_image_connector": True,
        },
    },
}


@pytest.fixture(scope="module")
def media_rows(tmp_path_factory) -> Path:
    return save_tiny_media_rows(tmp_path_factory.mktemp("media"), CONTENTS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return lru_cache(lambda towers: tiny_model(tmp_path_factory.mktemp("parts"), **TOWERS[towers]))


SLOW = ("frames one by one", "Q-Formers with positions")  # the others hold what is in them


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TOWERS])
def composed(request, models):
    """A model and its processor."""
    return models(request.param)


def test_the_model_reads_all_kinds_in_the_order_of_the_question(composed, media_rows):
    processor = composed[1]
    for example, letters in zip(_examples(processor, media_rows), CONTENTS, strict=True):
        chat = processor.encode_chat(example.row.messages, media_sizes=[item.size for item in example.row.media])
        assert [span.kind for span in chat.media] == [KINDS[letter] for letter in letters if letter != "t"]


def test_what_stands_in_a_span_is_what_the_medium_becomes_alone(composed, media_rows):
    """The reference puts the embeddings together by hand, one medium after the other."""
    model, processor = composed
    for example in _examples(processor, media_rows):
        batch = PaddingCollator(processor)([example])
        found = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        embeds = model.get_input_embeddings()(batch["input_ids"])[0].clone()
        items = list(PaddingCollator(processor).media_of(example))
        free = {kind: _places(model, kind, batch["input_ids"][0]) for kind in processor.media_kinds}
        for item in items:
            vectors = _encoded(model, processor.encode_media([item]), item.kind)
            own, free[item.kind] = free[item.kind][: len(vectors)], free[item.kind][len(vectors) :]
            embeds[own] = vectors
        assert not any(map(len, free.values()))
        expected = model(inputs_embeds=embeds[None]).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_padded_together_equals_alone(composed, media_rows):
    model, processor = composed
    examples = _examples(processor, media_rows)
    batch = PaddingCollator(processor)(examples)
    together = model(**_without_labels(batch)).logits
    for row, example in enumerate(examples):
        alone = model(**_without_labels(PaddingCollator(processor)([example]))).logits[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, rtol=0, atol=1e-5)


def test_packed_equals_padded_in_loss_and_gradients(composed, media_rows):
    model, processor = composed
    examples = _examples(processor, media_rows)
    model = apply_modes(model, {name: PartOptions("full") for name in parts_of(model)})
    try:
        padded = _loss_and_gradients(model, PaddingCollator(processor)(examples))
        isolate_segments(model, longest=500)
        packed = _loss_and_gradients(model, PackingCollator(processor)(examples))
    finally:
        model.set_attn_implementation("sdpa")
    assert padded.keys() == packed.keys()
    connectors = {name.split(".")[1] for name in padded if ".connector." in name}
    assert connectors == {"image_tower", "audio_tower", "video_tower"}
    for name, value in padded.items():
        torch.testing.assert_close(packed[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_a_packed_run_equals_a_padded_one(train, models, media_rows, tmp_path):
    """All rows in every step: as packs one after the other, of which some hold all kinds, and as one batch."""
    model, processor = models("frames through the image connector")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    options = {"model": str(tmp_path / "model"), "data": [str(media_rows)], "optim": "sgd", "max_steps": 2}
    options["parts"] = {f"{kind}.connector": "full" for kind in KINDS.values()} | {"text": "full"}
    whole = train(tmp_path / "whole", **options, per_device_train_batch_size=len(CONTENTS))
    packed = train(
        tmp_path / "packed", **options, per_device_train_batch_size=None, batching="packed", pack_length=200,
        gradient_accumulation_steps=100,
    )  # fmt: skip
    one, other = (load_model(run / "final").state_dict() for run in (whole, packed))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5, msg=name)
    changed = {name.split(".")[1] for name, value in model.state_dict().items() if not torch.equal(value, one[name])}
    assert changed == {"image_tower", "audio_tower", "video_tower", "language_model", "weight"}


def test_images_and_frames_share_one_call_of_their_encoder(composed, media_rows):
    model, processor = composed
    batch = PaddingCollator(processor)(_examples(processor, media_rows))
    calls = []
    hooks = [
        tower.encoder.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
        for tower in model.model.towers.values()
        if tower.encoder is not None
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == sorted(
        [len(batch["pixel_values"]) + len(batch["pixel_values_videos"]), len(batch["input_features"])]
    )


def test_chunks_of_the_encoders_change_nothing(composed, media_rows):
    model, processor = composed
    batch = PaddingCollator(processor)(_examples(processor, media_rows))
    whole = model(**batch).loss
    model.model.set_encoder_chunk(2)
    try:
        torch.testing.assert_close(model(**batch).loss, whole, rtol=0, atol=1e-5)
    finally:
        model.model.set_encoder_chunk(None)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_together_are_those_alone(composed, media_rows, num_beams):
    """And with a cache they are those without."""
    model, processor = composed
    prompts = [encode_prompt(processor, messages) for messages in _questions(media_rows)]
    config = generation_config(model, max_new_tokens=5, temperature=0.0)
    config.num_beams = num_beams
    together = _answers(model, processor, prompts, config, use_cache=True)
    assert together == _answers(model, processor, prompts, config, use_cache=False)
    for number, prompt in enumerate(prompts):
        assert _answers(model, processor, [prompt], config, use_cache=True) == [together[number]]
    # The comparison would see media that were swapped.
    assert len({tuple(answer) for answer in together}) > 1


def test_beams_have_the_media_of_their_row_in_order(composed, media_rows):
    """The score of the best beam is what a plain forward says of its tokens, behind several media of a kind too."""
    model, processor = composed
    config = generation_config(model, max_new_tokens=3, temperature=0.0)
    config.num_beams, config.length_penalty = 3, 0.0
    config.return_dict_in_generate = True
    config.output_scores = True
    prompts = [encode_prompt(processor, messages) for messages in _questions(media_rows)]
    inputs = model_inputs(processor, prompts, device=model.device)
    found = model.generate(**inputs, generation_config=config)
    for number, prompt in enumerate(prompts):
        (answer,) = _without_prompt(found.sequences[number : number + 1], inputs)
        answer = answer[: len(without_end(answer, config)) + 1]
        alone = model_inputs(processor, [prompt], device=model.device)
        ids = torch.cat([alone["input_ids"], torch.tensor([answer])], dim=1)
        logits = model(**alone | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0, :-1]
        expected = logits.log_softmax(-1)[-len(answer) :, answer].diagonal().sum()
        torch.testing.assert_close(found.sequences_scores[number], expected, rtol=0, atol=1e-4)


def test_media_that_are_missing_are_an_error(models, media_rows):
    model, processor = models("frames through the image connector")
    batch = _without_labels(PaddingCollator(processor)(_examples(processor, media_rows)))
    for kind, name in (("image", "pixel_values"), ("audio", "input_features"), ("video", "pixel_values_videos")):
        lacking = {key: value for key, value in batch.items() if not key.startswith((name, f"{kind}_sizes"))}
        if kind == "image":  # its name begins that of the frames
            lacking |= {key: value for key, value in batch.items() if "video" in key}
        for call in (model, model.generate):
            with pytest.raises(RowError, match="placeholder tokens .* for 0 feature vectors"):
                call(**lacking)
    too_few = batch | {"pixel_values_videos": batch["pixel_values_videos"][:-1]}
    with pytest.raises(RowError, match=r"\d+ views of 6 items of kind video"):
        model(**too_few)


def _examples(processor, rows: Path) -> list:
    examples = Examples(open_mixture(read_mixture([str(rows)])), processor)
    found = [examples[number] for number in range(len(examples))]
    assert len(found) == len(CONTENTS)
    return found


def _places(model, kind: str, input_ids: torch.Tensor) -> torch.Tensor:
    return (input_ids == model.config.tower_configs[kind].placeholder_token_id).nonzero().flatten()


def _encoded(model, inputs: dict, kind: str) -> torch.Tensor:
    encode = {"image": model.get_image_features, "audio": model.get_audio_features, "video": model.get_video_features}
    (vectors,) = encode[kind](**inputs).pooler_output
    return vectors


def _without_labels(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name != "labels"}


def _loss_and_gradients(model, batch: dict) -> dict[str, torch.Tensor]:
    model.eval().zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return {"loss": loss.detach(), **gradients}


def _questions(rows: Path) -> list[list[dict]]:
    """The rows' questions, with their files in the place of content items."""
    found = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        files = (str(rows.parent / item["path"]) for item in row["media"])
        content = [
            item if item["type"] == "text" else {**item, item["type"]: next(files)}
            for item in row["messages"][0]["content"]
        ]
        found.append([{"role": "user", "content": content}])
    return found


def _answers(model, processor, prompts, config, *, use_cache: bool) -> list[list[int]]:
    inputs = model_inputs(processor, prompts, device=model.device)
    with torch.no_grad():
        found = model.generate(**inputs, generation_config=config, use_cache=use_cache)
    return [without_end(answer, config) for answer in _without_prompt(found, inputs)]


def _without_prompt(sequences: torch.Tensor, inputs: dict) -> list[list[int]]:
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()
