"""Composing parts from disk: what comes out, and what is refused."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from mllm import load_model, load_processor
from mllm.assemble import assemble, assemble_checkpoint
from mllm.checkpoints import is_complete
from mllm.errors import CheckpointError, CompositionError, OptionError
from mllm.testing import save_tiny_parts, tiny_model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare_rows", [8, 0])
def test_placeholder_takes_an_unused_row_or_a_new_one(tmp_path, spare_rows, tied):
    paths = save_tiny_parts(tmp_path, spare_rows=spare_rows, tied=tied)
    tokenizer = AutoTokenizer.from_pretrained(paths["language_model"])
    rows = len(tokenizer) + spare_rows
    llm = AutoModelForCausalLM.from_pretrained(paths["language_model"])
    model, processor = assemble(**paths)
    assert model.config.image_token_id == processor.image_token_id == len(tokenizer)
    assert (
        model.get_input_embeddings().num_embeddings
        == max(rows, len(tokenizer) + 1)
        == model.config.text_config.vocab_size
    )
    assert torch.equal(model.get_input_embeddings().weight[:rows], llm.get_input_embeddings().weight)
    assert torch.equal(model.lm_head.weight[:rows], llm.get_output_embeddings().weight)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_checkpoint_is_complete_and_loads_again(tmp_path):
    paths = save_tiny_parts(tmp_path)
    out = assemble_checkpoint(tmp_path / "model", **paths)
    assert is_complete(out, kind="model")
    model, processor = load_model(out), load_processor(out)
    expected, _ = assemble(**paths)
    for (name, value), (_, other) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert torch.equal(value, other), name
    assert processor.image_token_id == model.config.image_token_id
    with pytest.raises(CheckpointError, match="exists already"):
        assemble_checkpoint(out, **paths)


def test_seed_decides_the_connector_and_nothing_else(tmp_path):
    paths = save_tiny_parts(tmp_path)
    before = torch.get_rng_state()
    first, again, other = (assemble(**paths, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    name = "model.image_tower.connector.linear_1.weight"
    weights = [model.state_dict()[name] for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_control_tokens_are_never_generated(tmp_path):
    model, processor = tiny_model(tmp_path)
    config = model.generation_config
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in config.eos_token_id and end not in config.suppress_tokens
    for text in ("<image>", "<|im_start|>", "<tool_call>"):
        token = processor.tokenizer.convert_tokens_to_ids(text)
        assert (token in config.suppress_tokens) == (text != "<tool_call>")
    # Not even when the model wants nothing else.
    with torch.no_grad():
        model.lm_head.weight.zero_()
    out = model.generate(torch.tensor([[5, 6]]), max_new_tokens=30, do_sample=True, temperature=10.0)
    assert not set(out[0, 2:].tolist()) & set(config.suppress_tokens)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.5}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("phi", {}),
    ],
)
def test_language_models_whose_head_would_change(tmp_path, family, fields):
    with pytest.raises(CompositionError, match=f"{family}.*other logits on text"):
        tiny_model(tmp_path, llm=family, **fields)


def test_encoder_decoder_is_refused(tmp_path):
    paths = save_tiny_parts(tmp_path)
    config = T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(CompositionError, match="encoder-decoder"):
        assemble(**{**paths, "language_model": str(tmp_path / "t5")})


def test_parts_that_are_not_there_or_the_wrong_way_round(tmp_path):
    paths = save_tiny_parts(tmp_path)
    with pytest.raises(CompositionError, match="image.encoder = .*nowhere"):
        assemble(**{**paths, "image": {"encoder": str(tmp_path / "nowhere")}})
    with pytest.raises(CompositionError, match="expected: an image encoder"):
        assemble(image={"encoder": paths["language_model"]}, language_model=paths["language_model"])
    with pytest.raises(CompositionError, match="language_model = .* is not a causal language model"):
        assemble(image=paths["image"], language_model=paths["image"]["encoder"])


def test_a_wrong_encoder_is_named_before_the_language_model_is_loaded(tmp_path):
    paths = save_tiny_parts(tmp_path)
    for weights in Path(paths["language_model"]).glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(CompositionError, match="image.encoder = .*nowhere"):
        assemble(**{**paths, "image": {"encoder": str(tmp_path / "nowhere")}})


def test_options_that_do_not_fit(tmp_path):
    paths = save_tiny_parts(tmp_path, encoder="siglip_vision_model")
    with pytest.raises(CompositionError, match="no class token"):
        assemble(**paths | {"image": paths["image"] | {"feature_select": "default"}})
    with pytest.raises(OptionError, match="pad"):
        assemble(**paths | {"image": paths["image"] | {"geometry": "stretch"}})


def test_nothing_is_left_of_a_failed_assembly(tmp_path):
    paths = save_tiny_parts(tmp_path)
    with pytest.raises(OptionError):
        assemble_checkpoint(tmp_path / "model", **paths | {"image": paths["image"] | {"geometry": "stretch"}})
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("model")]
