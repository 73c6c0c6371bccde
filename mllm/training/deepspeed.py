"""A DeepSpeed configuration against the options of a run: what contradicts them is an error before anything is loaded.

DeepSpeed has its own word for many of our options. Where the two differ, one of them is silently not what was meant.
"""

from collections.abc import Mapping
from typing import Any

from mllm.errors import OptionError
from mllm.training.options import SftArguments

STAGES = (0, 1, 2, 3)
AUTO = "auto"
FOREIGN = {
    "optimizer": "the optimiser is ours: DeepSpeed's would replace it, and with it each part's own learning rate. Set "
    "`optim`, `learning_rate` and `parts`",
    "scheduler": "the schedule is ours. Set `lr_scheduler_type` and `warmup_steps`",
    "amp": "mixed precision is bf16. Set `bf16: true`",
    "tensor_parallel": "batches are planned for processes that each hold all layers whole while they run",
    "sequence_parallel_size": "batches are planned for processes that each read their own rows",
}
"""Sections that a configuration cannot have, and what there is instead."""


def check_config(config: Mapping[str, Any], args: SftArguments, *, world_size: int, on_cpu: bool) -> None:
    """Check a configuration as accelerate has read it.

    Args:
        config: DeepSpeed's JSON, or what accelerate made of its own YAML.
        args: The run's options.
        world_size: Number of processes.
        on_cpu: Whether the run is on the CPU.

    Raises:
        OptionError: It contradicts the options, or the run could not be saved.
    """
    for section, instead in FOREIGN.items():
        if section in config:
            raise OptionError(
                f"a DeepSpeed configuration with `{section}`", expected=f"none: {instead}", do="remove it"
            )
    _check_values(config, args, world_size)
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage")
    if stage not in STAGES:
        raise OptionError(
            f"DeepSpeed: zero_optimization.stage = {stage!r}",
            expected=f"one of {', '.join(map(str, STAGES))}",
            do="see train/accelerate/zero2.yaml and zero3.yaml",
        )
    _check_offload(zero, stage, on_cpu=on_cpu)
    if stage == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise OptionError(
            "DeepSpeed: ZeRO-3 without stage3_gather_16bit_weights_on_model_save",
            expected="true: every checkpoint can be loaded as a model, by any number of processes",
            do="set it (in accelerate's YAML: zero3_save_16bit_model: true)",
        )


def check_parts(config: Mapping[str, Any], args: SftArguments) -> None:
    """Check how the parts are trained against how their weights are sharded; needs no model.

    Raises:
        OptionError: DeepSpeed cannot train the parts like that.
    """
    if config["zero_optimization"]["stage"] != 3:
        return
    packed = [name for name, chosen in args.parts.items() if chosen.quantize is not None]
    if packed:
        raise OptionError(
            f"parts: {packed[0]}: quantize under ZeRO-3, which cannot shard packed weights",
            expected="ZeRO-2: in 4 bits the weights are a quarter, and every process holds them whole",
            do="use train/accelerate/zero2.yaml, or remove `quantize`",
        )
    kind = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if kind is False and args.gradient_checkpointing:
        raise OptionError(
            "gradient_checkpointing_kwargs: use_reentrant = false under ZeRO-3",
            expected="reentrant checkpointing: in the backward the other kind meets weights that are shards again",
            do="remove `use_reentrant`",
        )


def use_gloo_alone() -> None:
    """On the CPU let DeepSpeed communicate through gloo, without the C++ of its own that it would compile first.

    What is compiled are sums over shared memory, for processors that have the instructions; results are the same.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_device(device: str) -> None:
    """DeepSpeed chooses its device by itself; it has to be that of the run.

    Raises:
        OptionError: It is another.
    """
    from deepspeed.accelerator import get_accelerator

    chosen = get_accelerator().device_name()
    if chosen != device:
        raise OptionError(
            f"the run is on {device}, and DeepSpeed on {chosen}",
            expected="the same device",
            do=f"set DS_ACCELERATOR={device} in the environment",
        )


def _check_values(config: Mapping[str, Any], args: SftArguments, world_size: int) -> None:
    """What both have a word for is the same, or "auto"."""
    rows, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    for name, option, value in (
        ("train_micro_batch_size_per_gpu", "per_device_train_batch_size", rows),
        ("gradient_accumulation_steps", "gradient_accumulation_steps", steps),
        (
            "train_batch_size",
            f"per_device_train_batch_size x gradient_accumulation_steps x {world_size} processes",
            rows * steps * world_size,
        ),
        ("gradient_clipping", "max_grad_norm", args.max_grad_norm),
        ("bf16.enabled", "bf16", args.bf16),
        ("fp16.enabled", "fp16", args.fp16),
    ):
        found: Any = config
        for key in name.split("."):
            found = found.get(key, AUTO) if isinstance(found, Mapping) else found
        if found not in (AUTO, value):
            raise OptionError(
                f"DeepSpeed: {name} = {found}, and {option} = {value}",
                expected="the same in both, or `auto` in DeepSpeed's configuration",
                do=f"set DeepSpeed's {name} to `auto`",
            )


def _check_offload(zero: Mapping[str, Any], stage: int, *, on_cpu: bool) -> None:
    """Whatever is put elsewhere has to be sharded, and elsewhere has to be elsewhere."""
    for section, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = (zero.get(section) or {}).get("device") or "none"
        if device == "none":
            continue
        if stage < least:
            raise OptionError(
                f"DeepSpeed: {section} to {device} at stage {stage}, which keeps all of it on every process",
                expected=f"stage {least} or more",
                do=f"raise `stage`, or remove {section}",
            )
        if on_cpu:
            raise OptionError(
                f"DeepSpeed: {section} to {device}, and the run is on the CPU",
                expected="no offloading: it would compile DeepSpeed's CPU optimiser, to move nothing",
                do=f"remove {section}",
            )
