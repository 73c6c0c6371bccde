"""Probes: short conversations that a composed model and its export must answer alike."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mllm.data.collate import decode_media
from mllm.data.indexing.index import open_index
from mllm.data.schema import Row
from mllm.data.sources import Source
from mllm.errors import OptionError
from mllm.export.stock_process import continue_greedily
from mllm.processing import MllmProcessor

LOGIT_POSITIONS = 32
"""Logits are compared at this many last positions: they attend to all that comes before, at a bounded size."""
NEW_TOKENS = 64
"""Length of the greedy continuations that are compared, unless they end before: a short caption to its end."""
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
    """What one probe became on its way through a processor and a model.

    Args:
        input_ids: The prompt.
        pixel_values: Its images, [N, 3, H, W].
        logits: At the prompt's last positions, [K, vocabulary].
        greedy_ids: The continuation, its end token included.
        margins: By how much each of `greedy_ids` was the best token.
        greedy_text: The continuation without control tokens.
    """

    input_ids: list[int]
    pixel_values: Tensor | None
    logits: Tensor
    greedy_ids: list[int]
    margins: list[float]
    greedy_text: str


def synthetic_probes(side: int | None) -> list[Probe]:
    """Probes without any data at hand: no image, one, two, and one that is not square; the first alone without `side`.

    A literal "<image>" in a user's text is left out on purpose: stock processors take it for an image's placeholder
    (a typical report: https://github.com/hiyouga/LLaMA-Factory/issues/5658); ours do not.
    """
    text_only = Probe("text only", [_user("What is two plus two?")], [])
    if side is None:
        return [text_only]
    square, wide, tall = (_picture(*size) for size in ((side, side), (side, 2 * side), (side + side // 2, side)))
    return [
        text_only,
        Probe("one image", [_user(None, "Describe the picture.")], [square]),
        Probe("two images", [_user(None, "Compare it with", None, "please.")], [square, tall]),
        Probe(
            "not square, second turn",
            [_user(None, "What is there?"), _say("assistant", "A picture."), _user("Where?")],
            [wide],
        ),
    ]


def probes_from_rows(path: str | Path, *, limit: int) -> list[Probe]:
    """Probes out of the first rows of a row file: each a conversation up to its last answer, which is left out.

    Stock processors read a control token in somebody's words as one, ours do not: such a row will be found to differ.

    Args:
        path: A file of rows, as recipes write them, or of any form that can be trained on.
        limit: How many rows.

    Raises:
        OptionError: There is no such file, or nothing in it.
        RowError: A row of the file is malformed, or a picture cannot be read.
    """
    if limit < 1:
        raise OptionError(f"{limit} rows to compare", expected="at least one", do="ask for more rows")
    index = open_index(Source(Path(path)))
    return [_probe(index[number]) for number in range(min(limit, len(index)))]


def answer_probes(model: nn.Module, processor: MllmProcessor, probes: list[Probe]) -> list[Answer]:
    """Answer every probe with our own processor and model, the way training and chat use them."""
    inputs = [probe_inputs(processor, probe) for probe in probes]
    continuations = continue_greedily(model, inputs, NEW_TOKENS)
    return [
        Answer(
            input_ids=one["input_ids"][0].tolist(),
            pixel_values=one.get("pixel_values"),
            logits=probe_logits(model, one),
            greedy_ids=ids.tolist(),
            margins=margins.tolist(),
            greedy_text=processor.tokenizer.decode(ids, skip_special_tokens=True),
        )
        for one, (ids, margins) in zip(inputs, continuations, strict=True)
    ]


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


def remove_probes(directory: Path) -> None:
    """Take stored probes away again."""
    shutil.rmtree(directory / FOLDER)


def _probe(row: Row) -> Probe:
    messages = _prompt(row.messages)
    num_images = sum(item["type"] == "image" for message in messages for item in message["content"])
    images = [decode_media(media, where=row.name) for media in row.media[:num_images]]
    return Probe(row.id, messages, images)


def _prompt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row's messages before its last answer, every content a list, without training's own keys (`loss`)."""
    last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
    return [
        {"role": message["role"], "content": [_item(item) for item in _as_items(message["content"])]}
        for message in messages[:last]
    ]


def _as_items(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _item(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "text", "text": item["text"]} if item["type"] == "text" else {"type": item["type"]}


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
