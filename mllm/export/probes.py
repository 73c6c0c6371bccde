"""Probes: short conversations that a composed model and its export must answer alike."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mllm.processing import MllmProcessor

LOGIT_POSITIONS = 32
"""Logits are compared at this many last positions: they attend to all that comes before, at a bounded size."""
NEW_TOKENS = 16
"""Length of the greedy continuations that are compared."""
FOLDER = "probes"


@dataclass(frozen=True)
class Probe:
    """A conversation to be continued.

    Args:
        name: What is tried by it.
        messages: Role and content items, `{"type": "text", "text": ...}` or `{"type": "image"}`.
        images: RGB images, one for each image item, in order.
    """

    name: str
    messages: list[dict[str, Any]]
    images: list[Image.Image]


@dataclass(frozen=True)
class Answer:
    """What one probe became on its way through a processor and a model."""

    input_ids: list[int]
    pixel_values: Tensor | None
    logits: Tensor
    greedy_ids: list[int]
    greedy_text: str


def synthetic_probes(side: int) -> list[Probe]:
    """Probes without any data at hand: no image, one, two, and one that is not square.

    A literal "<image>" in a user's text is left out on purpose: stock processors take it for an image's placeholder
    (a typical report: https://github.com/hiyouga/LLaMA-Factory/issues/5658); ours do not.
    """
    square, wide, tall = (_picture(*size) for size in ((side, side), (side, 2 * side), (side + side // 2, side)))
    return [
        Probe("text only", [_user("What is two plus two?")], []),
        Probe("one image", [_user(None, "Describe the picture.")], [square]),
        Probe("two images", [_user(None, "Compare it with", None, "please.")], [square, tall]),
        Probe(
            "not square, second turn",
            [_user(None, "What is there?"), _say("assistant", "A picture."), _user("Where?")],
            [wide],
        ),
    ]


def answer_probes(model: nn.Module, processor: MllmProcessor, probes: list[Probe]) -> list[Answer]:
    """Answer every probe with our own processor and model, the way training and chat use them."""
    return [_answer(model, processor, probe) for probe in probes]


def probe_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits [K, vocabulary] at the last positions of one probe."""
    with torch.no_grad():
        return model(**inputs, logits_to_keep=LOGIT_POSITIONS).logits[0]


def probe_inputs(processor: MllmProcessor, probe: Probe) -> dict[str, Tensor]:
    """A model's input for one probe."""
    sizes = [(image.height, image.width) for image in probe.images]
    encoded = processor.encode_chat(probe.messages, media_sizes=sizes, add_generation_prompt=True)
    ids = torch.tensor([encoded.input_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if probe.images:
        inputs["pixel_values"] = processor.encode_images(probe.images)
    return inputs


def store_probes(directory: Path, probes: list[Probe], answers: list[Answer]) -> None:
    """Write the probes, with the answers that any engine can be held to, below `directory`."""
    folder = directory / FOLDER
    folder.mkdir()
    records = []
    for number, (probe, answer) in enumerate(zip(probes, answers, strict=True)):
        files = [f"{number}-{index}.png" for index in range(len(probe.images))]
        for file, image in zip(files, probe.images, strict=True):
            image.save(folder / file)
        record = {"name": probe.name, "messages": probe.messages, "images": files}
        expected = {"input_ids": answer.input_ids, "greedy_ids": answer.greedy_ids, "greedy_text": answer.greedy_text}
        records.append({**record, "expected": expected})
    (folder / "probes.json").write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _answer(model: nn.Module, processor: MllmProcessor, probe: Probe) -> Answer:
    inputs = probe_inputs(processor, probe)
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0, inputs["input_ids"].shape[1] :]
    return Answer(
        input_ids=inputs["input_ids"][0].tolist(),
        pixel_values=inputs.get("pixel_values"),
        logits=probe_logits(model, inputs),
        greedy_ids=ids.tolist(),
        greedy_text=processor.tokenizer.decode(ids, skip_special_tokens=True),
    )


def _user(*items: str | None) -> dict[str, Any]:
    return _say("user", *items)


def _say(role: str, *items: str | None) -> dict[str, Any]:
    """One message; None stands for an image."""
    content = [{"type": "image"} if item is None else {"type": "text", "text": item} for item in items]
    return {"role": role, "content": content}


def _picture(height: int, width: int) -> Image.Image:
    """A colour gradient with stripes: no two patches alike, and the same bytes on every machine."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    stripes = 255 * ((rows // 3 + columns // 5) % 2)
    channels = [rows * 255 // max(height - 1, 1), columns * 255 // max(width - 1, 1), stripes]
    return Image.fromarray(torch.stack(channels, dim=-1).to(torch.uint8).numpy())
