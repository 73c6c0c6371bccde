"""Encoder micro-chunks == one call, in loss and gradients; and ranks call the encoder equally often."""

import multiprocessing
import os
import socket

import pytest
import torch

from mllm import load_model
from mllm.errors import OptionError
from mllm.models.parts import PartOptions, apply_modes, checkpoint_parts
from mllm.testing import tiny_model
from mllm.testing_checkpoints import save_stock_checkpoint

MODES = {
    "connector": {"image.connector": PartOptions("full")},
    "all": {name: PartOptions("full") for name in ("image.encoder", "image.connector", "text")},
    "checkpointed": {
        "image.encoder": PartOptions("full", checkpointing=True), "text": PartOptions("lora", rank=4),
    },
}  # fmt: skip
TIMEOUT = 100


@pytest.mark.parametrize("encoder", ["clip_vision_model", "siglip_vision_model", "vit"])
@pytest.mark.parametrize("modes", MODES.values(), ids=MODES.keys())
def test_chunks_equal_one_call(tmp_path, modes, encoder):
    model = tiny_model(tmp_path, encoder=encoder)[0]
    batch = _batch(model, num_images=5)
    trained = apply_modes(model, modes)
    checkpoint_parts(trained, modes)
    whole, num_calls = _step(trained, model, batch)
    assert num_calls == 1
    for chunk, expected_calls in ((1, 5), (2, 3), (5, 1), (8, 1)):
        model.model.set_encoder_chunk(chunk)
        found, num_calls = _step(trained, model, batch)
        assert num_calls == expected_calls
        assert found.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=f"{chunk}: {name}")


def test_no_more_than_a_chunk_is_encoded_at_a_time(tmp_path):
    model = tiny_model(tmp_path)[0]
    model.model.set_encoder_chunk(2)
    sizes = []
    model.model.image_tower.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    model(**_batch(model, num_images=5))
    assert sizes == [2, 2, 1]


def test_text_alone_calls_no_encoder(tmp_path):
    model = tiny_model(tmp_path)[0]
    model.model.set_encoder_chunk(1)
    calls = []
    model.model.image_tower.encoder.register_forward_pre_hook(lambda module, args: calls.append(module))
    model.train()(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    assert calls == []


def test_a_run_in_chunks_equals_one_without(train, tmp_path):
    options = {"parts": {"image.encoder": "full", "image.connector": "full"}, "optim": "sgd"}
    one, chunks = (
        load_model(train(tmp_path / str(chunk), encoder_chunk=chunk, **options) / "final").state_dict()
        for chunk in (None, 1)
    )
    for name, value in one.items():
        torch.testing.assert_close(chunks[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_a_stock_model_calls_its_encoder_once(train, tmp_path):
    base = save_stock_checkpoint(tmp_path / "base", "llava")
    with pytest.raises(OptionError, match="encoder_chunk = 2, and the model is a LlavaForConditionalGeneration"):
        train(tmp_path / "run", model=str(base), parts={"image.connector": "full"}, encoder_chunk=2)


@pytest.mark.parametrize("few", [0, 1])
@pytest.mark.parametrize("modes", MODES.values(), ids=MODES.keys())
def test_three_images_against_few_on_two_ranks(tmp_path, modes, few):
    """In chunks of 1, under DistributedDataParallel: the mean of the ranks' gradients, and 3 calls on both."""
    model = tiny_model(tmp_path)[0]
    batches = [_batch(model, num_images=3), _batch(model, num_images=few)]
    trained = apply_modes(model, modes)
    checkpoint_parts(trained, modes)
    alone = [_step(trained, model, batch)[0] for batch in batches]
    found = _on_two_ranks(trained, model, batches, tmp_path)
    encoder_is_trained = modes.get("image.encoder", PartOptions()).mode == "full"
    # A frozen encoder that is whole has no collectives: one call keeps the connector company.
    assert [calls for _, calls in found] == ([3, 3] if encoder_is_trained else [3, 1])
    for gradients, _ in found:
        for name in gradients:
            if name != "loss":
                expected = sum(one.get(name, torch.zeros(())) for one in alone) / 2
                torch.testing.assert_close(gradients[name], expected, rtol=1e-5, atol=1e-5, msg=name)
    assert [float(gradients["loss"]) for gradients, _ in found] == pytest.approx([float(a["loss"]) for a in alone])


def _batch(model, *, num_images: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, 300, (2, 30), generator=generator)
    # All images in the first row.
    input_ids[0, 2 : 2 + 4 * num_images] = model.config.image_config.placeholder_token_id
    batch = {"input_ids": input_ids, "labels": input_ids.clone()}
    if num_images:
        batch["pixel_values"] = torch.randn(num_images, 3, 16, 16, generator=generator)
    return batch


def _step(trained, model, batch, *, wrapped=None) -> tuple[dict[str, torch.Tensor], int]:
    """Loss and gradients by name, and how often the encoder was called."""
    calls = []
    handle = model.model.image_tower.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    trained.train().zero_grad(set_to_none=True)
    loss = (wrapped or trained)(**batch).loss
    if loss.requires_grad:  # not of text alone, where a connector alone is trained
        loss.backward()
    handle.remove()
    gradients = {name: p.grad.clone() for name, p in trained.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}, len(calls)


def _on_two_ranks(trained, model, batches, directory) -> list[tuple[dict[str, torch.Tensor], int]]:
    model.model.set_encoder_chunk(1)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    files = [directory / f"rank-{rank}.pt" for rank in range(2)]
    ranks = [
        context.Process(target=_rank, args=(rank, port, trained, model, batches[rank], files[rank]))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(TIMEOUT)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0, 0]
    return [torch.load(file, weights_only=True) for file in files]


def _rank(rank: int, port: int, trained, model, batch, file) -> None:
    names = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    torch.distributed.init_process_group("gloo")
    wrapped = torch.nn.parallel.DistributedDataParallel(trained)
    torch.save(_step(trained, model, batch, wrapped=wrapped), file)
    torch.distributed.destroy_process_group()
    os._exit(0)
