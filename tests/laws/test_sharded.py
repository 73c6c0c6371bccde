"""ZeRO-2 == ZeRO-3 == one process, on two ranks that really run over gloo, one of them without an image.

Each stage of ZeRO is one pair of processes, which does everything below: that a rank encodes three images one by one
while the other has none, a batch of text alone, parts that are frozen, adapted and trained in full, and a run that is
stopped and goes on. A collective that one rank does not join would stop them, or hang until the time is up.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mllm import load_model
from mllm.assemble import assemble_checkpoint
from mllm.checkpoints import mark_complete
from mllm.data.collate import PaddingCollator
from mllm.data.examples import Examples
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.load import merged
from mllm.models.parts import PartOptions, apply_modes
from mllm.testing import save_tiny_parts, tiny_model
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.training import trainer
from mllm.training.checkpoint import latest_checkpoint

ACCELERATE = Path(__file__).parents[2] / "train" / "accelerate"

OPTIONS = {"optim": "sgd", "max_steps": 5, "logging_steps": 1, "weight_decay": 0.1}
RUNS = {
    "all parts, image by image": {
        "parts": {"image.encoder": "full", "image.connector": "full", "text": "full"},
        "encoder_chunk": 1,
    },
    "connector alone": {"parts": {"image.connector": "full"}},
    "fewer visual tokens": {
        "parts": {"image.encoder": "full", "image.connector": "full", "text": {"mode": "lora", "rank": 4}},
        "pruner": {"method": "visionzip", "tokens": [1, 4]},
    },
    "lora and connector, accumulated": {
        "parts": {"image.connector": {"mode": "full", "learning_rate": 3e-2}, "text": {"mode": "lora", "rank": 4}},
        "gradient_accumulation_steps": 2,
    },
}
STOCK = {
    "parts": {"image.encoder": "full", "image.connector": "full", "text": {"mode": "lora", "rank": 4}},
    "max_steps": 3,
}
# With moments to be restored, and dropout to fall on the same places; activations are computed twice.
GOES_ON = {
    "parts": {
        "image.encoder": "full",
        "image.connector": "full",
        "text": {"mode": "lora", "rank": 4, "dropout": 0.3, "checkpointing": True},
    },
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 5,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    """The runs on a composed model, one on a model that reads images in tiles, and one on transformers' own LLaVA."""
    stock = tmp_path_factory.mktemp("stock") / "llava"
    save_stock_checkpoint(stock, "llava")
    parts = tmp_path_factory.mktemp("tiled")
    tiled = assemble_checkpoint(parts / "model", **save_tiny_parts(parts, image={"tiles": "llava_next"}))
    tiles = STOCK | {"model": str(tiled), "encoder_chunk": 2}
    return RUNS | {"tiles": tiles, "stock": STOCK | {"model": str(stock)}}


@pytest.fixture(scope="module")
def one(train, runs, lopsided_rows, tmp_path_factory) -> Path:
    """Each run in one process."""
    root = tmp_path_factory.mktemp("one")
    for name, options in runs.items():
        train(root / name, data=[str(lopsided_rows)], **OPTIONS | options, per_device_train_batch_size=4)
    return root


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_sharded_equals_one_process(train, runs, one, lopsided_rows, two_ranks, tmp_path, stage):
    two_ranks(_train_all, train, runs, lopsided_rows, tmp_path, stage)
    for name in runs:
        weights, sharded = (merged(load_model(root / name / "final")).state_dict() for root in (one, tmp_path))
        for key in weights:
            torch.testing.assert_close(weights[key], sharded[key], rtol=0, atol=1e-5, msg=f"{name}: {key}")
        assert _losses(tmp_path / name) == pytest.approx(_losses(one / name), abs=1e-5)

    straight, stopped = (load_model(tmp_path / run / "final").state_dict() for run in ("straight", "stopped"))
    assert [key for key in straight if not torch.equal(straight[key], stopped[key])] == []
    assert _losses(tmp_path / "straight") == _losses(tmp_path / "stopped")


def _train_all(train, runs: dict, rows: Path, root: Path, stage: str) -> None:
    """In each rank."""
    _be_launched(stage)
    for name, options in runs.items():
        train(root / name, data=[str(rows)], **OPTIONS | options)
    train(root / "straight", data=[str(rows)], **GOES_ON)
    if os.environ["RANK"] == "0":
        shutil.copytree(root / "straight", root / "stopped")
        for left in ("final", "checkpoint-4", "checkpoint-5"):
            shutil.rmtree(root / "stopped" / left)
    torch.distributed.barrier()
    train(root / "stopped", data=[str(rows)], **GOES_ON)


def test_fully_sharded_equals_one_process(lopsided_rows, two_ranks, tmp_path):
    """FSDP2 itself, since accelerate leaves it out on the CPU; each layer and the connector are sharded apart."""
    model, processor = tiny_model(tmp_path)
    examples = Examples(open_mixture(read_mixture([str(lopsided_rows)])), processor)
    with_images = [example for example in examples if example.row.media][:2]
    without = [example for example in examples if not example.row.media][:2]
    collate = PaddingCollator(processor)
    num_items = sum(int((example.labels[1:] != -100).sum()) for example in (*with_images, *without))
    options = {
        "image.connector": PartOptions("full"),
        "text": PartOptions("full"),
    }  # the encoder is frozen, and sharded
    model = apply_modes(model, options).train()
    model.model.set_encoder_chunk(1)
    loss = model(**collate([*with_images, *without]), use_cache=False, num_items_in_batch=num_items).loss
    two_ranks(_backward_sharded, model, [collate(with_images), collate(without)], num_items, tmp_path)
    loss.backward()
    sharded = torch.load(tmp_path / "sharded.pt", weights_only=True)
    torch.testing.assert_close(sharded.pop("loss"), loss.detach(), rtol=0, atol=1e-5)
    whole = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert whole.keys() == sharded.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(sharded[name], gradient, rtol=0, atol=1e-5, msg=name)


def _backward_sharded(model, batches: list[dict], num_items: int, root: Path) -> None:
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for name, module in reversed(list(model.named_modules())):
        if type(module).__name__ in model._no_split_modules or name.endswith(".connector"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # Gradients are averaged over ranks, as by DDP and by DeepSpeed: the loss is that of a rank times their number.
    batch = batches[torch.distributed.get_rank()]
    loss = 2 * model(**batch, use_cache=False, num_items_in_batch=num_items).loss
    loss.backward()
    torch.distributed.all_reduce(loss.data)
    gradients = {
        name: parameter.grad.full_tensor()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    if torch.distributed.get_rank() == 0:
        torch.save(gradients | {"loss": loss.detach() / 2}, root / "sharded.pt")
    torch.distributed.barrier()


@pytest.mark.slow
def test_killed_while_saving_goes_on_from_the_checkpoint_before(train, lopsided_rows, two_ranks, tmp_path):
    """The first rank is killed when all shards are written, and the checkpoint is not yet marked complete."""
    with pytest.raises(AssertionError):
        two_ranks(_train_and_die, train, lopsided_rows, tmp_path)
    assert latest_checkpoint(tmp_path / "killed") == tmp_path / "killed" / "checkpoint-2"
    two_ranks(_train_killed_and_straight, train, lopsided_rows, tmp_path)
    killed, straight = (load_model(tmp_path / run / "final").state_dict() for run in ("killed", "straight"))
    assert [key for key in straight if not torch.equal(straight[key], killed[key])] == []
    assert sorted(os.listdir(tmp_path / "killed")) == sorted(os.listdir(tmp_path / "straight"))


def _train_and_die(train, rows: Path, root: Path) -> None:
    def mark_or_die(directory: Path, **kwargs) -> None:
        if directory.name == "checkpoint-4":
            assert len(list(directory.glob("global_step4/*optim_states.pt"))) == 2
            os.kill(os.getpid(), signal.SIGKILL)
        mark_complete(directory, **kwargs)

    trainer.mark_complete = mark_or_die
    _be_launched("zero2")
    train(root / "killed", data=[str(rows)], **GOES_ON)


def _train_killed_and_straight(train, rows: Path, root: Path) -> None:
    _be_launched("zero2")
    for name in ("killed", "straight"):
        train(root / name, data=[str(rows)], **GOES_ON)


@pytest.mark.gpu
def test_fsdp2_through_accelerate_equals_one_process(one, lopsided_rows, assembled, tmp_path):
    """On all GPUs there are, be it one; with the file that is shipped."""
    name = "all parts, image by image"
    options = OPTIONS | RUNS[name] | {"model": str(assembled), "data": [str(lopsided_rows)], "learning_rate": 1e-2}
    options |= {"per_device_train_batch_size": 4 // torch.cuda.device_count(), "report_to": "none"}
    options |= {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / "run")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    command = [sys.executable, ACCELERATE.parent / "launch.py", "--config_file", ACCELERATE / "fsdp2.yaml"]
    command += ["--num_processes", str(torch.cuda.device_count()), ACCELERATE.parent / "sft.py"]
    for left in ((), ("final", "checkpoint-4", "checkpoint-5")):  # from the beginning, and from the first checkpoint
        for name_left in left:
            shutil.rmtree(tmp_path / "run" / name_left)
        subprocess.run([*command, "--config", tmp_path / "run.yaml"], check=True, timeout=300)
        weights, sharded = (load_model(run / "final").state_dict() for run in (one / name, tmp_path / "run"))
        for key in weights:
            torch.testing.assert_close(weights[key], sharded[key], rtol=0, atol=1e-4, msg=key)


def _be_launched(stage: str) -> None:
    """Make this process one that `accelerate launch` has started with one of our files."""
    os.environ |= deepspeed_environment(stage)
    del os.environ["ACCELERATE_USE_CPU"]


def deepspeed_environment(stage: str) -> dict[str, str]:
    """What `accelerate launch` tells the processes that it starts with one of our files."""
    told = {
        "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
        "zero3_init_flag": "ACCELERATE_DEEPSPEED_ZERO3_INIT",
        "zero3_save_16bit_model": "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
        "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
        "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
        "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    }
    config = yaml.safe_load((ACCELERATE / f"{stage}.yaml").read_text())["deepspeed_config"]
    return {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"} | {
        told[key]: str(value).lower() for key, value in config.items()
    }


def _losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
