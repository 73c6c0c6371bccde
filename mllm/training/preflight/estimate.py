"""The memory estimate of a run: the formula of `memory`, with the numbers that the options, model and batches give."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from mllm.data.collate import Collated
from mllm.data.labels import IGNORED
from mllm.models import MllmForConditionalGeneration
from mllm.models.media import VALUES as MEDIA
from mllm.models.parts import PartOptions, own_modules, parts_of
from mllm.training.arguments import SftArguments
from mllm.training.preference_options import PreferenceArguments
from mllm.training.preflight.connectors import connector_layers, feature_shape, num_views
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
    if has_own_reference(args, model):
        weights *= 2
    itemsize = 2 if args.bf16 or args.fp16 else plain.get_input_embeddings().weight.element_size()
    positions = _encoder_positions(args, plain, layers, batch)
    kept = activation_numbers(_stacks(plain, layers, positions, batch), (layers["text"], batch["input_ids"].numel()))
    widest = max(
        (count * _at_once(args, plain, name, batch) * max(layers[name].widths) for name, count in positions.items()),
        default=0.0,
    )
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
        batch=batch_bytes(batch) + _cached_bytes(args, plain, batch),
        sharding=sharding.name,
    )


def has_own_reference(args: SftArguments, model: nn.Module) -> bool:
    """Whether a preference run holds a second model beside the one that it trains, as large as that."""
    if not isinstance(args, PreferenceArguments) or args.precompute_ref_log_probs:
        return False
    return args.reference is not None or not isinstance(model, PeftModel)


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


def _stacks(
    plain: PreTrainedModel, layers: Mapping[str, Layers], positions: Mapping[str, int], batch: Mapping[str, Any]
) -> list[list[tuple[Layers, int]]]:
    """Of each modality its encoder and its connector, and how many positions go through each."""
    if not isinstance(plain, MllmForConditionalGeneration):
        return [
            [(layers[name], count), (layers[name.replace(".encoder", ".connector")], count)]
            for name, count in positions.items()
        ]
    stacks = []
    for kind, tower in plain.model.towers.items():
        name = f"{kind}.encoder"
        encoder = [(layers[name], positions[name])] if name in layers else []
        stacks.append([*encoder, connector_layers(kind, tower, layers[f"{kind}.connector"], batch)])
    return stacks


def _encoder_positions(
    args: SftArguments, plain: PreTrainedModel, layers: Mapping[str, Layers], batch: Mapping[str, Any]
) -> dict[str, int]:
    """How many positions go through each encoder; none where what it gave is at hand."""
    parts = parts_of(plain)
    found = dict.fromkeys((name for name in layers if name.endswith(".encoder")), 0)
    for name in found if args.feature_cache is None else ():
        modules = own_modules(plain, parts[name])
        encoder = nn.ModuleList(plain.get_submodule(module) for module in modules)
        found[name] = sum(media_positions(encoder, batch.get(MEDIA[kind])) for kind in _kinds_seen(name, parts))
    return found


def _kinds_seen(encoder: str, parts: Collection[str]) -> list[str]:
    """The kinds of media that an encoder sees: that of images also sees frames, where no other does."""
    kind = encoder.split(".")[0]
    return [kind, "video"] if kind == "image" and "video.encoder" not in parts else [kind]


def _cached_bytes(args: SftArguments, plain: PreTrainedModel, batch: Mapping[str, Any]) -> int:
    """How much larger a batch is with features in place of the encoders' inputs."""
    if args.feature_cache is None or not isinstance(plain, MllmForConditionalGeneration):
        return 0
    found = 0
    for kind, tower in plain.model.towers.items():
        encoding = tower if tower.encoder is not None else plain.model.image_tower
        features = num_views(kind, batch) * math.prod(feature_shape(encoding)) * encoding.dtype.itemsize
        found += features - batch_bytes({kind: batch.get(MEDIA[kind])})
    return found


def _at_once(args: SftArguments, plain: PreTrainedModel, encoder: str, batch: Mapping[str, Any]) -> float:
    """The share of a batch's views that an encoder reads in one call."""
    if args.encoder_chunk is None:
        return 1.0
    views = sum(num_views(kind, batch) for kind in _kinds_seen(encoder, parts_of(plain)))
    return min(1.0, args.encoder_chunk / max(views, 1))
