"""The memory estimate of a run: the formula of `memory`, with the numbers that the options, model and batches give."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mllm.data.collate import Collated
from mllm.data.labels import IGNORED
from mllm.models.parts import PartOptions, own_modules, parts_of
from mllm.training.arguments import SftArguments
from mllm.training.preflight.memory import (
    Layers,
    MemoryEstimate,
    Sharding,
    activation_numbers,
    batch_bytes,
    layers_of_part,
    logit_bytes,
    media_positions,
    parameter_bytes,
)
from mllm.training.sharding import is_fsdp

MEDIA = {"image": "pixel_values", "audio": "input_features", "video": "pixel_values_videos"}
"""What a batch calls the input of each encoder."""


def layers_of_parts(model: PreTrainedModel, args: SftArguments) -> dict[str, Layers]:
    """The layers of every part, from the model as it was loaded."""
    return {
        name: layers_of_part(
            model,
            part,
            args.parts.get(name, PartOptions()),
            is_checkpointed=args.gradient_checkpointing or args.parts.get(name, PartOptions()).checkpointing,
        )
        for name, part in parts_of(model).items()
    }


def estimate_memory(
    args: SftArguments, plain: PreTrainedModel, model: nn.Module, layers: Mapping[str, Layers], heaviest: Collated
) -> MemoryEstimate:
    """What a rank needs at the most.

    Args:
        args: The run's options.
        plain: The model without its adapters' wrapper.
        model: With its modes applied.
        layers: Of every part.
        heaviest: The largest micro-batch.
    """
    sharding, batch = sharding_of(args), heaviest.batch
    weights, gradients, optimizer = parameter_bytes(model, optim=str(args.optim.value), sharding=sharding)
    itemsize = 2 if args.bf16 or args.fp16 else plain.get_input_embeddings().weight.element_size()
    positions = {name: _positions(plain, name, batch) for name in layers if name.endswith(".encoder")}
    if args.feature_cache is not None:
        positions = dict.fromkeys(positions, 0)
    stacks = [
        [(layers[name], count), (layers[name.replace(".encoder", ".connector")], count)]
        for name, count in positions.items()
    ]
    kept = activation_numbers(stacks, (layers["text"], batch["input_ids"].numel()))
    at_once = min(1.0, (args.encoder_chunk or 1 << 30) / max(sum(heaviest.num_media.values()), 1))
    widest = max((count * at_once * max(layers[name].widths) for name, count in positions.items()), default=0.0)
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=max(kept, int(widest)) * itemsize,
        logits=logit_bytes(
            int((batch["labels"][:, 1:] != IGNORED).sum()),
            plain.get_input_embeddings().weight.shape[0],
            device=args.device.type,
        ),
        batch=batch_bytes(batch),
        sharding=sharding.name,
    )


def sharding_of(args: SftArguments) -> Sharding:
    """How the run divides its memory over the ranks."""
    ranks = args.world_size
    if args.deepspeed_plugin is not None:
        stage = args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"]
        return Sharding(
            name=f"ZeRO-{stage}",
            weights=ranks if stage >= 3 else 1,
            gradients=ranks if stage >= 2 else 1,
            optimizer=ranks if stage >= 1 else 1,
            is_half=args.bf16 or args.fp16,
        )
    if is_fsdp(args):
        return Sharding(name="FSDP", weights=ranks, gradients=ranks, optimizer=ranks)
    return Sharding()


def _positions(model: PreTrainedModel, name: str, batch: Mapping[str, Any]) -> int:
    part = parts_of(model)[name]
    encoder = nn.ModuleList(model.get_submodule(module) for module in own_modules(model, part))
    return media_positions(encoder, batch.get(MEDIA[name.split(".")[0]]))
