"""What shards a run is checked against its options before anything is loaded."""

import base64
import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState, PartialState
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from mllm.errors import OptionError
from mllm.training.arguments import build_arguments
from mllm.training.sharding import check_launcher, check_sharding, describe_sharding, whole_models

ACCELERATE = Path(__file__).parents[2] / "train" / "accelerate"
FILES = sorted(ACCELERATE.glob("*.yaml"))
BASE = {"model": "m", "data": ["rows.jsonl"], "parts": {"text": "full"}, "output_dir": "o", "use_cpu": True}
AUTO = {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}
ZERO2 = AUTO | {"zero_optimization": {"stage": 2}}
ZERO3 = AUTO | {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}


@pytest.fixture(autouse=True)
def _no_deepspeed_left():
    """DeepSpeed and accelerate keep what they were told in globals."""
    pytest.importorskip("deepspeed")
    yield
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def launched(monkeypatch):
    """Arguments as in a process that `accelerate launch` has started with this configuration of DeepSpeed."""

    def start(config: dict, **options):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        told = base64.urlsafe_b64encode(json.dumps(config).encode()).decode()
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", told)
        return build_arguments(BASE | options, where="the test")

    return start


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_shipped_files_start_where_they_can(file):
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    check_launcher(config, has_gpu=True)
    assert "optimizer" not in config.get("deepspeed_config", {})


@pytest.mark.parametrize("stage", ["zero2", "zero3", "fsdp2"])
def test_what_accelerate_would_ignore_is_an_error(stage):
    config = yaml.safe_load((ACCELERATE / f"{stage}.yaml").read_text(encoding="utf-8"))
    with pytest.raises(OptionError, match="use_cpu: true"):
        check_launcher(config | {"use_cpu": True}, has_gpu=True)


def test_fsdp_needs_a_gpu(monkeypatch):
    config = yaml.safe_load((ACCELERATE / "fsdp2.yaml").read_text(encoding="utf-8"))
    with pytest.raises(OptionError, match="on the CPU(.|\n)*zero3.yaml"):
        check_launcher(config, has_gpu=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(OptionError, match="on the CPU(.|\n)*zero3.yaml"):
        check_sharding(build_arguments(BASE, where="the test"))


@pytest.mark.parametrize(("name", "value"), [("fsdp_version", 1), ("fsdp_state_dict_type", "SHARDED_STATE_DICT")])
def test_fsdp_keeps_whole_checkpoints(name, value):
    config = yaml.safe_load((ACCELERATE / "fsdp2.yaml").read_text(encoding="utf-8"))
    config["fsdp_config"][name] = value
    with pytest.raises(OptionError, match=f"{name} = {value!r}"):
        check_launcher(config, has_gpu=True)


def test_without_deepspeed_its_extra_is_named(monkeypatch):
    config = yaml.safe_load((ACCELERATE / "zero2.yaml").read_text(encoding="utf-8"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"not installed(.|\n)*\.\[deepspeed\]"):
        check_launcher(config, has_gpu=True)
    with pytest.raises(OptionError, match=r"not installed(.|\n)*\.\[deepspeed\]"):
        build_arguments(BASE | {"deepspeed": "zero.json"}, where="the test")


@pytest.mark.parametrize("config", [ZERO2, ZERO3], ids=["zero2", "zero3"])
def test_a_configuration_that_agrees(launched, config):
    args = launched(config, gradient_accumulation_steps=3)
    check_sharding(args)
    assert describe_sharding(args) == f"deepspeed zero {config['zero_optimization']['stage']}"


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (ZERO2 | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, {}, "`optimizer`(.|\n)*learning rate"),
        (ZERO2 | {"scheduler": {"type": "WarmupLR"}}, {}, "`scheduler`(.|\n)*lr_scheduler_type"),
        (ZERO2 | {"train_micro_batch_size_per_gpu": 4}, {}, "= 4, and per_device_train_batch_size = 8"),
        (
            ZERO2 | {"gradient_accumulation_steps": 2},
            {"gradient_accumulation_steps": 3},
            "= 2, and gradient_accumulation_steps = 3",
        ),
        (ZERO2 | {"train_batch_size": 64}, {}, "= 64, and (.|\n)*1 processes = 8"),
        (ZERO2 | {"gradient_clipping": 0.3}, {}, "= 0.3, and max_grad_norm = 1.0"),
        (ZERO2 | {"bf16": {"enabled": True}}, {}, "bf16.enabled = True, and bf16 = False"),
        (ZERO2 | {"fp16": {"enabled": True}}, {}, "fp16.enabled = True, and fp16 = False"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            {},
            "offload_optimizer to cpu, and the run is on the CPU",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            {},
            "offload_param to cpu at stage 2",
        ),
        ({"zero_optimization": {"stage": 3}}, {}, "stage3_gather_16bit_weights_on_model_save"),
        ({"zero_optimization": {"stage": 4}}, {}, "stage = 4"),
        (ZERO3, {"parts": {"text": {"mode": "lora", "quantize": "4bit"}}}, "quantize under ZeRO-3"),
        (
            ZERO3,
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
            "use_reentrant = false",
        ),
    ],
)
def test_a_configuration_that_contradicts_the_options(launched, config, options, message):
    with pytest.raises(OptionError, match=message):
        check_sharding(launched(config, **options))


def test_deepspeed_on_the_cpu_is_told_by_the_run(launched, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(OptionError, match="use_cpu: true"):
        check_sharding(launched(ZERO2))


def test_a_model_that_one_process_prepares_is_whole(launched):
    args = launched(ZERO3)
    assert is_deepspeed_zero3_enabled()
    with whole_models(args):
        assert not is_deepspeed_zero3_enabled()
    assert is_deepspeed_zero3_enabled()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (subprocess.CalledProcessError(2, "train/sft.py"), 2),
        (ChildFailedError("train/sft.py", {0: ProcessFailure(0, 1, 2, "no file")}), 2),
        (ChildFailedError("train/sft.py", {0: ProcessFailure(0, 1, -9, "no file")}), 137),
    ],
    ids=["one process", "several", "killed"],
)
def test_the_launcher_ends_as_the_run_did(monkeypatch, error, status):
    def fail() -> None:
        raise error

    spec = importlib.util.spec_from_file_location("program_launch", ACCELERATE.parent / "launch.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    monkeypatch.setattr(program, "accelerate_launch", fail)
    with pytest.raises(SystemExit) as caught:
        program.main()
    assert caught.value.code == status
