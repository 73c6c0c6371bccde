"""Saved == reloaded: weights, and what generation is told, bit for bit."""

import torch

from mllm import load_model
from mllm.testing import tiny_model


def test_a_model_is_saved_as_it_is(tmp_path):
    for tied in (False, True):
        model, _ = tiny_model(tmp_path / f"parts-{tied}", tied=tied)
        model.save_pretrained(tmp_path / f"saved-{tied}")
        before, after = model.state_dict(), load_model(tmp_path / f"saved-{tied}").state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_full_run_is_saved_as_it_was_trained(train, tmp_path, assembled):
    parts = {"image.connector": "full", "text": "full"}
    run = train(tmp_path / "run", parts=parts, save_strategy="steps", save_steps=4)
    checkpoint, final = (load_model(run / name) for name in ("checkpoint-4", "final"))
    assert all(torch.equal(one, other) for one, other in zip(checkpoint.parameters(), final.parameters(), strict=True))
    before = load_model(assembled).generation_config
    assert final.generation_config.to_diff_dict() == before.to_diff_dict()
    assert final.generation_config.suppress_tokens


def test_a_language_model_of_bfloat16_comes_back_whole(tmp_path):
    """Encoder, connector and language model in one type: the language model's, or the one that is asked for."""
    model, _ = tiny_model(tmp_path / "parts")
    model.bfloat16().save_pretrained(tmp_path / "saved")
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        loaded = load_model(tmp_path / "saved", dtype=dtype)
        assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
        pixels, ids = torch.zeros(1, 3, 16, 16), torch.tensor([[1, *[model.config.image_token_id] * 4, 2]])
        assert loaded(input_ids=ids, pixel_values=pixels).logits.dtype == expected
