"""Join encoders, fresh connectors and a language model into one model with its processor."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mllm.assemble.audio import audio_tower
from mllm.assemble.image import image_tower
from mllm.assemble.language_model import (
    check_text_only_equality,
    extend_embedding,
    generation_config,
    language_model_config,
)
from mllm.assemble.options import TOWERS, tower_options
from mllm.assemble.qformers import begin, connector_start, question_options
from mllm.assemble.tiles import geometry_of
from mllm.assemble.tower import Tower
from mllm.assemble.video import asked_of_frames, video_tower
from mllm.checkpoints import atomic_directory
from mllm.errors import CompositionError, OptionError
from mllm.models import MllmConfig, MllmForConditionalGeneration
from mllm.models.connectors import build_connector, connector_options
from mllm.processing import MllmProcessor
from mllm.processing.build import PLACEHOLDERS, add_placeholder, build_processor


def assemble_checkpoint(out: str | Path, **options) -> Path:
    """Assemble a model and save it with its processor as one complete checkpoint.

    Args:
        out: Directory to be made; it must not exist.
        **options: The arguments of `assemble`.
    """
    with atomic_directory(out, kind="model", facts={"assembled_from": options}) as partial:
        model, processor = assemble(**options)
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
    return Path(out)


def assemble(
    *,
    language_model: str,
    image: Mapping[str, Any] | None = None,
    audio: Mapping[str, Any] | None = None,
    video: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    seed: int = 0,
) -> tuple[MllmForConditionalGeneration, MllmProcessor]:
    """Compose a model on the CPU out of pretrained parts and connectors with fresh weights.

    Args:
        language_model: Directory or Hub id of a decoder-only language model with its tokenizer.
        image: Encoder and connector for images, see `ImageTowerOptions`.
        audio: Encoder and connector for sounds, see `AudioTowerOptions`.
        video: Connector for videos, whose frames the image encoder reads, see `VideoTowerOptions`.
        chat_template: Name of one of our templates; by default the tokenizer's own, if it can mark generation.
        seed: Seed of the connectors' weights.

    Raises:
        CompositionError: A part is missing, of a kind that cannot be composed, or changed by being composed.
        OptionError: An option is unknown, or has no such value.
    """
    given = {"image": image, "audio": audio, "video": video}
    options = {modality: tower_options(modality, one) for modality, one in given.items()}
    starts = {modality: connector_start(one.connector) for modality, one in options.items() if one}
    options |= {modality: replace(options[modality], connector=start.choice) for modality, start in starts.items()}
    # The largest part is loaded last: what is wrong with the others is said before.
    towers = _towers(options, text_hidden_size=language_model_config(language_model).hidden_size)
    llm = AutoModelForCausalLM.from_pretrained(language_model)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    for modality, tower in towers.items():
        num_rows = llm.get_input_embeddings().num_embeddings
        tower.config.placeholder_token_id = add_placeholder(tokenizer, PLACEHOLDERS[modality], num_rows=num_rows)
        if tower.config.placeholder_token_id >= num_rows:
            extend_embedding(llm, tower.config.placeholder_token_id + 1)

    model = _join(towers, llm, seed=seed)
    for modality, start in starts.items():
        begin(model.model.towers[modality].connector, start)
    check_text_only_equality(model, llm, where=language_model)
    processor = build_processor(
        tokenizer,
        towers["image"].component if "image" in towers else None,
        towers["audio"].component if "audio" in towers else None,
        rules={modality: tower.config.media_rule for modality, tower in towers.items()},
        geometry=geometry_of(options["image"].tiles, options["image"].geometry) if "image" in towers else "pad",
        chat_template=chat_template,
        **asked_of_frames(
            question_options(starts, {modality: tower.config.connector for modality, tower in towers.items()}),
            video=towers.get("video"),
        ),
    )
    model.generation_config = generation_config(llm, processor)
    return model, processor


def assembly_options(given: Mapping[str, Any], *, where: str = "") -> dict[str, Any]:
    """Check a `model:` mapping, its towers and their connectors against what `assemble` takes; nothing is loaded.

    Args:
        given: The mapping.
        where: Names the file it stands in, in errors.

    Raises:
        OptionError: A key is unknown or missing, or an option has no such value.
    """
    known = tuple(inspect.signature(assemble).parameters)
    wrong = [f"unknown key {key!r}" for key in given if key not in known]
    if not given.get("language_model"):
        wrong.append("no language_model")
    if not any(given.get(modality) for modality in TOWERS):
        wrong.append(f"none of {', '.join(TOWERS)}")
    if wrong:
        others = [name for name in known if name not in ("language_model", *TOWERS)]
        raise OptionError(
            f"model: {wrong[0]}" + (f" in {where}" if where else ""),
            expected=f"language_model, at least one of {', '.join(TOWERS)}, and what differs from the defaults of "
            f"{', '.join(others)}",
            do="correct the mapping under `model`",
        )
    for modality in TOWERS:
        tower = tower_options(modality, given.get(modality))
        if tower is not None and tower.connector is not None:
            connector_options(tower.connector)
    return dict(given)


def _towers(options: Mapping[str, Any], *, text_hidden_size: int) -> dict[str, Tower]:
    if not any(options.values()):
        raise CompositionError(
            "a model without any encoder",
            expected=f"at least one of {', '.join(TOWERS)}",
            do="add, e.g., `image: {encoder: ...}` under `model`",
        )
    towers = {}
    if options["image"]:
        towers["image"] = image_tower(options["image"], text_hidden_size=text_hidden_size)
    if options["audio"]:
        towers["audio"] = audio_tower(options["audio"], text_hidden_size=text_hidden_size)
    if options["video"]:
        image = towers.get("image")
        towers["video"] = video_tower(options["video"], text_hidden_size=text_hidden_size, image=image)
    return towers


def _join(towers: Mapping[str, Tower], llm: PreTrainedModel, *, seed: int) -> MllmForConditionalGeneration:
    """Build the shell without memory, then put the loaded parts in: no weight is copied or initialised twice."""
    configs = {f"{modality}_config": tower.config for modality, tower in towers.items()}
    config = MllmConfig(text_config=llm.config, dtype=llm.dtype, **configs)
    with torch.device("meta"):
        model = MllmForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        connectors = {modality: build_connector(tower.config) for modality, tower in towers.items()}
    for modality, tower in towers.items():
        if tower.connector_weights is not None:
            connectors[modality].load_state_dict(tower.connector_weights)
        model.model.towers[modality].encoder = tower.encoder
        model.model.towers[modality].connector = connectors[modality]
    model.model.language_model = llm.base_model
    model.lm_head = llm.get_output_embeddings()
    return model.to(llm.dtype).eval()
