"""The model that a policy is compared with, where it is one of its own."""

from contextlib import nullcontext
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from mllm.load import ADAPTER_CONFIG, checkpoint_directory, load_model, merged
from mllm.training.architecture import check_architecture
from mllm.training.batching import prepare_attention
from mllm.training.preference_options import PreferenceArguments
from mllm.training.sharding import whole_models
from mllm.training.start import set_encoder_chunk


def reference_model(args: PreferenceArguments, base: Path, model: torch.nn.Module) -> PreTrainedModel | None:
    """The model that the policy is compared with, where it is not the policy itself without its adapters.

    Raises:
        CheckpointError: There is no model at `reference`.
        OptionError: It is of another architecture.
    """
    if args.reference is None and isinstance(model, PeftModel):
        return None
    return load_reference(args, base, model)


def reference_directory(args: PreferenceArguments, base: Path) -> Path:
    """Where the reference lies, be it the model that the run starts from.

    Raises:
        CheckpointError: There is no model at `reference`.
    """
    return base if args.reference is None else checkpoint_directory(args.reference)


def load_reference(args: PreferenceArguments, base: Path, model: torch.nn.Module) -> PreTrainedModel:
    """The reference as a model of its own. Under ZeRO-3 it is loaded in shards, outside of `whole_models`.

    Raises:
        CheckpointError, OptionError: As `reference_model` does.
    """
    path = reference_directory(args, base)
    is_adapter = (path / ADAPTER_CONFIG).is_file()
    with whole_models(args) if is_adapter else nullcontext():  # shards cannot be merged
        reference = merged(load_model(path, dtype=args.dtype))
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    check_architecture(path, reference.config, plain.config)
    prepare_attention(args, reference)
    if args.encoder_chunk is not None:
        set_encoder_chunk(reference, args.encoder_chunk)
    return reference


def check_reference(args: PreferenceArguments, model: torch.nn.Module) -> None:
    """Check that the reference that is named is there, and of the model's architecture; it is not loaded.

    Of an adapter that is only known of the model that it belongs to, and told when the run starts.

    Raises:
        CheckpointError: There is no model.
        OptionError: It is of another architecture.
    """
    if args.reference is None:
        return
    path = checkpoint_directory(args.reference)
    if (path / CONFIG_NAME).is_file():
        plain = model.get_base_model() if isinstance(model, PeftModel) else model
        check_architecture(path, AutoConfig.from_pretrained(str(path)), plain.config)
