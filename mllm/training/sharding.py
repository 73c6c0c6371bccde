"""How a run is spread over processes: what shards it, and what that needs; checked before anything is loaded."""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import nn
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from mllm.errors import OptionError
from mllm.models.parts.adapters import COPY
from mllm.training.deepspeed import check_config, check_device, check_parts, use_gloo_alone
from mllm.training.options import SftArguments

DEEPSPEED_MISSING = OptionError(
    "this run is to be sharded by DeepSpeed, which is not installed",
    expected="mllm with its extra `deepspeed` (Linux)",
    do="pip install --editable '.[deepspeed]', with DS_BUILD_OPS=0 in the environment to compile nothing",
)
NO_FSDP_ON_CPU = OptionError(
    "FSDP is asked for, and the run is on the CPU, where accelerate ignores it",
    expected="a GPU for each process",
    do="on the CPU shard with DeepSpeed (train/accelerate/zero3.yaml), or not at all (ddp.yaml)",
)
IGNORED_BY_ACCELERATE = OptionError(
    "accelerate is told `use_cpu: true`, and then leaves out the sharding that it is told, too",
    expected="`use_cpu: false` in accelerate's configuration; the run's own option `use_cpu` decides",
    do="correct the configuration, and start with --use_cpu true for a run on the CPU",
)

FSDP_NEEDS = {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"}


def check_launcher(config: Mapping[str, Any], *, has_gpu: bool) -> None:
    """Check a configuration of accelerate before its processes are started.

    accelerate leaves out of account what it cannot do, and trains all the same, unsharded.

    Args:
        config: Content of the YAML file.
        has_gpu: Whether this machine has an accelerator.

    Raises:
        OptionError: DeepSpeed is wanted and missing, or sharding is wanted and would not happen.
    """
    kind = config.get("distributed_type")
    if kind == DistributedType.DEEPSPEED.value:
        require_deepspeed()
    if kind in (DistributedType.DEEPSPEED.value, DistributedType.FSDP.value) and config.get("use_cpu"):
        raise IGNORED_BY_ACCELERATE
    if kind == DistributedType.FSDP.value and not has_gpu:
        raise NO_FSDP_ON_CPU
    for name, value in FSDP_NEEDS.items() if kind == DistributedType.FSDP.value else ():
        if (found := (config.get("fsdp_config") or {}).get(name)) != value:
            raise OptionError(
                f"{name} = {found!r} in accelerate's configuration of FSDP",
                expected=f"{value}; checkpoints are whole models, and only FSDP2 trains parts next to frozen ones",
                do="see train/accelerate/fsdp2.yaml",
            )


def require_deepspeed() -> None:
    """Check that DeepSpeed, which is no dependency of ours, is installed.

    Raises:
        OptionError: It is not; the extra is named.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise DEEPSPEED_MISSING


def check_sharding(args: SftArguments) -> None:
    """Check what shards the run against its options, before the model is loaded.

    Raises:
        OptionError: They contradict each other, or the sharding would not happen.
    """
    on_cpu = args.device.type == "cpu"
    if is_fsdp(args) and on_cpu:
        raise NO_FSDP_ON_CPU
    if args.deepspeed_plugin is None:
        return
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise IGNORED_BY_ACCELERATE
    config = args.deepspeed_plugin.deepspeed_config
    check_config(config, args, world_size=args.world_size, on_cpu=on_cpu)
    check_parts(config, args)
    check_device(args.device.type)
    if on_cpu:
        use_gloo_alone()


def is_fsdp(args: SftArguments) -> bool:
    """Whether FSDP is asked for: by the run's options, or by the launcher, which says so in the environment."""
    return bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")


def describe_sharding(args: SftArguments) -> str | None:
    """What shards the run, for its record: a checkpoint's optimiser state can be read by the same kind only."""
    if args.deepspeed_plugin is not None:
        return f"deepspeed zero {args.deepspeed_plugin.deepspeed_config['zero_optimization']['stage']}"
    return "fsdp" if is_fsdp(args) else None


def is_zero3(args: SftArguments) -> bool:
    """Whether the weights themselves are sharded by DeepSpeed."""
    plugin = args.deepspeed_plugin
    return plugin is not None and plugin.deepspeed_config["zero_optimization"]["stage"] == 3


def settle_dtype(model: nn.Module, args: SftArguments) -> None:
    """Under DeepSpeed all weights of a model are of one type; PEFT keeps adapters in float32.

    With bf16 it casts a model itself, and then keeps float32 master weights of what is trained; but of a model that is
    sharded already (ZeRO-3) it takes the types as they are.

    Raises:
        OptionError: The weights are of another type than the one that is computed in.
    """
    if args.deepspeed_plugin is None:
        return
    expected = torch.bfloat16 if args.bf16 else torch.float32
    for name, parameter in model.named_parameters():
        if parameter.dtype == expected or not parameter.is_floating_point():
            continue
        if not args.bf16:
            raise OptionError(
                f"under DeepSpeed without `bf16: true`, weights of {parameter.dtype} (such as {name})",
                expected="float32 weights, or bf16: true (computation in bfloat16, master weights in float32)",
                do="set `bf16: true`, or `dtype: float32`",
            )
        parameter.data = parameter.data.to(expected)


@contextmanager
def whole_models(args: SftArguments) -> Iterator[None]:
    """Models that are loaded in here are whole, also under ZeRO-3, which would shard them over all processes.

    One process assembles or merges the model to start from while the others wait.
    """
    if not is_zero3(args):
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin = args.deepspeed_plugin
        set_hf_deepspeed_config(plugin.hf_ds_config if args.deepspeed else plugin.dschf)


def hold_frozen(model: nn.Module, args: SftArguments, accelerator: Accelerator) -> nn.Module:
    """A model that is asked beside the one that is trained: in the same precision, and in shards where that is.

    Elsewhere every process holds all of it: without gradients and optimiser it is the smaller of the two.
    """
    model.requires_grad_(False).eval()
    settle_dtype(model, args)
    if not is_zero3(args):
        model.to(args.device)  # under FSDP accelerate would leave it where it is
        return accelerator.prepare_model(model, evaluation_mode=True)
    import deepspeed

    zero = args.deepspeed_plugin.deepspeed_config["zero_optimization"]
    config = {
        "train_micro_batch_size_per_gpu": 1,  # it has to be told one
        "zero_optimization": {"stage": 3, "offload_param": zero.get("offload_param") or {"device": "none"}},
        "bf16": {"enabled": args.bf16},
    }
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.eval()
    return engine


@contextmanager
def whole_copies(model: nn.Module) -> Iterator[None]:
    """Parts that are trained in full beside adapters are saved whole, with what no feature passes and so stays frozen.

    Of sharded adapters transformers saves what has a gradient, and PEFT then misses the rest.
    """
    frozen = [one for name, one in model.named_parameters() if f".{COPY}." in name and not one.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
