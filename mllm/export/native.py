"""Write a model as a stock transformers checkpoint, and prove it equal before the directory gets its name."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from mllm.checkpoints import atomic_directory, refuse_existing
from mllm.errors import ExportError, OptionError
from mllm.export.card import write_card
from mllm.export.mappings import ExportTarget, find_target, rename_parameters
from mllm.export.probes import (
    Probe,
    answer_probes,
    probe_inputs,
    probe_logits,
    remove_probes,
    store_probes,
    synthetic_probes,
)
from mllm.export.report import ExportReport, describe_files, library_versions, write_report
from mllm.export.verify import RELATIVE_TOLERANCES, max_difference, verify
from mllm.load import ADAPTER_CONFIG, base_model_path, load_model, load_processor, merged
from mllm.models import MllmConfig, MllmForConditionalGeneration
from mllm.processing import MllmProcessor, StockProcessor

MERGE_TOLERANCE = 1e-5
"""Largest difference of logits that merging may make in float32, times the largest logit where that is above 1.

W x + s B A x and (W + s B A) x differ by rounding only, but rounding is relative and adds up over the layers: a model
of 7B parameters, whose logits reach 20 or more, differs by more than 1e-5 absolute."""


def export(
    model_dir: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    target: str | None = None,
    probes: list[Probe] | None = None,
    title: str | None = None,
) -> ExportReport:
    """Export a checkpoint to a stock class; `out` appears complete and verified, or not at all.

    An adapter is merged in float32 first, and rounded once. Both sides are then run in the export's type, ours here
    and the written directory in a fresh process with transformers alone: float32 must agree bit for bit.

    Args:
        model_dir: An assembled or trained checkpoint, or an adapter.
        out: The directory to write.
        dtype: "float32", "bfloat16" or "float16"; the type it was trained in by default.
        target: A key of `mllm.export.mappings.TARGETS`; the first that fits by default.
        probes: Conversations to compare. They may be somebody's data, so they are not kept in the export; the
            synthetic ones, which are the default, are.
        title: What the card calls it, such as the ORG/NAME it will be pushed to; the directory's name by default.

    Raises:
        CheckpointError: `out` exists, or `model_dir` is no finished checkpoint.
        ExportError: No stock class can express the model, or the export differs from it.
    """
    started = time.monotonic()
    refuse_existing(Path(out))
    _check_dtype(dtype)
    processor = _composed(load_processor(model_dir), model_dir)
    rule = processor.image_token_rule
    asked = synthetic_probes(None if rule is None else rule.image_size) if probes is None else probes
    model, origin = load_trained(model_dir, processor, asked, dtype=dtype)
    chosen = find_target(model, processor, name=target)
    with atomic_directory(out, kind="export", facts={"architecture": chosen.architecture}) as partial:
        expected = answer_probes(model, processor, asked)
        num_parameters = write_stock(model, processor, partial, target=chosen)
        store_probes(partial, asked, expected)
        del model  # a large model must not be in memory twice
        parity = verify(partial, expected, dtype=origin.dtype)
        report = ExportReport(
            architecture=chosen.architecture,
            dtype=origin.dtype,
            trained_dtype=origin.trained_dtype,
            num_parameters=num_parameters,
            num_probes=parity.num_probes,
            max_abs_diff=parity.max_abs_diff,
            tolerance=parity.tolerance,
            same_tokens=parity.same_tokens,
            merge_max_abs_diff=origin.merge_max_abs_diff,
            rounding_max_abs_diff=origin.rounding_max_abs_diff,
            versions=library_versions(),
        )
        if probes is not None:
            remove_probes(partial)
        write_card(partial, Path(model_dir), report, title=title or Path(out).name)
        report = replace(report, files=describe_files(partial), seconds=round(time.monotonic() - started, 1))
        write_report(partial, report)
    return report


def _composed(processor: MllmProcessor | StockProcessor, model_dir: str | Path) -> MllmProcessor:
    if isinstance(processor, StockProcessor):
        raise ExportError(
            f"{model_dir} holds a model of a stock class",
            expected="a model that was composed here, to be written as a stock class",
            do="nothing where it holds whole weights: it is a stock checkpoint already; an adapter is merged by "
            "mllm.load.merged(mllm.load_model(DIR)).save_pretrained(OUT)",
        )
    return processor


@dataclass(frozen=True)
class Origin:
    """What became of a model on its way from the checkpoint to the export's type; see `ExportReport`."""

    dtype: str
    trained_dtype: str
    merge_max_abs_diff: float | None
    rounding_max_abs_diff: float | None


def load_trained(
    path: str | Path, processor: MllmProcessor, probes: list[Probe], *, dtype: str | None = None
) -> tuple[MllmForConditionalGeneration, Origin]:
    """Load a checkpoint as a plain model in the type it is to be exported in.

    Raises:
        ExportError: The merged model answers otherwise than the adapter did.
    """
    is_adapter = (Path(path) / ADAPTER_CONFIG).is_file()
    trained_dtype = _name(MllmConfig.from_pretrained(base_model_path(path) if is_adapter else path).dtype)
    model = load_model(path, dtype=torch.float32 if is_adapter else "auto").eval()
    inputs = [probe_inputs(processor, probe) for probe in probes]
    merge_diff = None
    if isinstance(model, PeftModel):
        before = tuple(probe_logits(model, one) for one in inputs)
        model = merged(model).eval()
        merge_diff = max_difference(before, tuple(probe_logits(model, one) for one in inputs))
        _check_merge(merge_diff, before, path)
    dtype = dtype or trained_dtype
    rounding_diff = None
    if _name(model.dtype) != dtype:
        before = tuple(probe_logits(model, one) for one in inputs)
        cast_weights(model, getattr(torch, dtype))
        rounding_diff = max_difference(before, tuple(probe_logits(model, one) for one in inputs))
    return model, Origin(dtype, trained_dtype, merge_diff, rounding_diff)


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round what a checkpoint holds to `dtype`, in place.

    `model.to(dtype)` would also round buffers that are computed at loading, such as rotary frequencies, which
    `from_pretrained` leaves in float32.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.dtype = dtype


def write_stock(
    model: MllmForConditionalGeneration, processor: MllmProcessor, directory: Path, *, target: ExportTarget
) -> int:
    """Write model and processor under their stock names; returns the number of parameters.

    Raises:
        ExportError: Parameters are missing, left over or of another shape, or tied on one side only.
    """
    config = target.build_config(model.config)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.dtype = model.dtype
    with torch.device("meta"):
        stock = target.model_class(config)
    state = rename_parameters(model.state_dict(), target.renames)
    _check_state(stock.state_dict(), state, is_tied=config.tie_word_embeddings)
    stock.load_state_dict(state, strict=True, assign=True)
    stock.tie_weights()
    stock.generation_config = _generation_config(model)
    stock.save_pretrained(directory, max_shard_size="5GB")
    target.build_processor(processor, model.config).save_pretrained(directory)
    return sum(parameter.numel() for parameter in stock.parameters())


def _generation_config(model: MllmForConditionalGeneration) -> GenerationConfig:
    """The model's own, in which ids that must not be generated are suppressed, its placeholders whatever else."""
    fields = model.generation_config.to_dict()
    fields.pop("_from_model_config", None)  # with it, loading would derive the settings from the model's config again
    config = GenerationConfig.from_dict(fields)
    suppressed = {
        *(config.suppress_tokens or []),
        *(tower.placeholder_token_id for tower in model.config.tower_configs.values()),
    }
    config.suppress_tokens = sorted(suppressed)
    return config


def _check_state(stock: dict[str, torch.Tensor], state: dict[str, torch.Tensor], *, is_tied: bool) -> None:
    missing, left_over = sorted(stock.keys() - state.keys()), sorted(state.keys() - stock.keys())
    other_shape = sorted(key for key in stock.keys() & state.keys() if stock[key].shape != state[key].shape)
    if missing or left_over or other_shape:
        raise ExportError(
            f"parameters missing {missing[:3]}, left over {left_over[:3]}, of other shape {other_shape[:3]}",
            expected="exactly the parameters of the stock class",
            do="check that config.json describes the weights (vocab_size after an extension); else report this",
        )
    head, embedding = state["lm_head.weight"], state.get("model.language_model.embed_tokens.weight")
    if is_tied and (embedding is None or head.data_ptr() != embedding.data_ptr()):
        raise ExportError(
            "head and embedding are two tensors, and the configuration says that they are one",
            expected="tied weights, or `tie_word_embeddings: false`",
            do="set `tie_word_embeddings` to false in config.json's text_config if both were trained apart",
        )


def _check_merge(difference: float, logits: tuple[torch.Tensor, ...], path: str | Path) -> None:
    allowed = MERGE_TOLERANCE * max(1.0, *(float(one.abs().max()) for one in logits))
    if not difference <= allowed:
        raise ExportError(
            f"after merging, the logits of {path} differ from the adapter's by up to {difference:.3g}",
            expected=f"at most {allowed:.3g} in float32",
            do="report this with adapter_config.json; nothing was written",
        )


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in RELATIVE_TOLERANCES:
        raise OptionError(
            f"dtype = {dtype!r}",
            expected=f"one of {', '.join(RELATIVE_TOLERANCES)}",
            do="name one of them, or none for the type the model was trained in",
        )


def _name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")
