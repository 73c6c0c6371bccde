"""The model card of an export: what it was made of, how to use it, how it was checked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mllm.checkpoints import read_complete
from mllm.export.probes import FOLDER
from mllm.export.report import CARD, ExportReport
from mllm.load import ADAPTER_CONFIG, base_model_path

RUN_RECORD = "run.json"

_BODY = """# {title}

A vision-language model: an image encoder, a connector and a language model, composed and trained with mllm and
exported to `{architecture}` of transformers. Nothing but transformers is needed to use it.

## Use

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

path = "{title}"  # this repository's id, or the directory
processor = AutoProcessor.from_pretrained(path)
model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto")
picture = {{"type": "image", "image": Image.open("picture.png")}}
question = {{"type": "text", "text": "What is in the picture?"}}
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": [picture, question]}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
).to(model.device, dtype=model.dtype)
output = model.generate(**inputs, max_new_tokens=128)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

As with every processor of this kind, a literal `<image>` inside a user's text is taken for an image.

## Composition

{composition}

## Data

{data}

## Checked before it was written

The directory was loaded by transformers {transformers} in a fresh process without mllm, on the CPU, and compared with
the model it was made from on {num_probes} conversations {probes}:
{comparison}.

Pixel values are those of the PIL image processor (`backend="pil"`), which transformers takes where torchvision is not
installed; torchvision's resizing rounds slightly differently.
"""


def write_card(directory: Path, model_dir: Path, report: ExportReport, *, title: str) -> None:
    """Write `README.md`, with the metadata the Hub reads on top.

    Args:
        directory: The export.
        model_dir: The checkpoint it was made from; tells parts and data as far as they were recorded.
        report: The numbers of the verification.
        title: Name of the export.
    """
    parts, sources = read_parts(model_dir), read_sources(model_dir)
    body = _BODY.format(
        title=title,
        architecture=report.architecture,
        composition=_composition(parts, report, read_quantized(model_dir)),
        data=_data(sources),
        transformers=report.versions["transformers"],
        num_probes=report.num_probes,
        comparison=_comparison(report),
        probes=f"(`{FOLDER}/`)" if (directory / FOLDER).is_dir() else "of its user's, which are not kept here",
    )
    header = yaml.safe_dump(_metadata(parts), sort_keys=False)
    (directory / CARD).write_text(f"---\n{header}---\n\n{body}", encoding="utf-8")


def read_parts(model_dir: Path) -> dict[str, str]:
    """What the model was assembled from: options of `assemble` (`image.encoder`); empty where nothing tells.

    Looks at the checkpoint, then at the one it was trained from, and so on to the assembled one.
    """
    for directory in _ancestry(model_dir):
        assembled = (read_complete(directory) or {}).get("assembled_from")
        if assembled:
            return _flat(assembled)
    return {}


def read_sources(model_dir: Path) -> list[dict[str, Any]]:
    """The row files of every stage the model went through, last stage first, as `run.json` records them."""
    return [source for directory in _ancestry(model_dir) for source in _read_run(directory).get("data", [])]


def read_quantized(model_dir: Path) -> list[str]:
    """The parts that the model's last stage held in 4 bits while it trained an adapter."""
    parts = _read_run(model_dir).get("options", {}).get("parts", {})
    return [name for name, chosen in parts.items() if chosen.get("quantize")]


def _ancestry(model_dir: Path) -> list[Path]:
    """The checkpoint and those it was trained from, as far as they are still there."""
    found: list[Path] = []
    current: Path | None = model_dir
    while current is not None and current.is_dir() and current.resolve() not in found:
        found.append(current.resolve())
        parent = _read_run(current).get("model", {}).get("path")
        if (current / ADAPTER_CONFIG).is_file():
            current = base_model_path(current)
        else:
            current = None if parent is None else Path(parent)
    return found


def _read_run(directory: Path) -> dict[str, Any]:
    file = directory / RUN_RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _metadata(parts: dict[str, str]) -> dict[str, Any]:
    """The card's metadata, https://huggingface.co/docs/hub/model-cards. Base models only where they are Hub ids.

    No licence is stated: which one follows from those of the parts and the data is not for a program to decide.
    """
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["mllm"]}
    names = ("language_model", "image.encoder", "audio.encoder")
    bases = [parts[name] for name in names if _is_hub_id(parts.get(name, ""))]
    return {**metadata, "base_model": bases} if bases else metadata


def _flat(options: Mapping[str, Any]) -> dict[str, str]:
    """Options of `assemble` with those of its towers under dotted names."""
    flat: dict[str, str] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": str(one) for key, one in value.items()}
        elif value is not None:
            flat[name] = str(value)
    return flat


def _composition(parts: dict[str, str], report: ExportReport, quantized: list[str]) -> str:
    lines = [f"| {name.replace('_', ' ')} | {_public(value)} |" for name, value in parts.items()]
    lines += [f"| parameters | {report.num_parameters:,} |", f"| type of the weights | {report.dtype} |"]
    if quantized:
        how = f"over 4-bit weights of {', '.join(quantized)}; merged into the weights that these were made from"
        lines.append(f"| adapter trained | {how} |")
    return "\n".join(["| | |", "|---|---|", *lines])


def _data(sources: list[dict[str, Any]]) -> str:
    if not sources:
        return "Not recorded. Licences of the parts above and of the data apply."
    rows = [f"| {Path(file['path']).name} | {file['rows']:,} | {file['sha256'][:12]} |" for file in sources]
    table = "\n".join(["| rows from | rows | SHA-256 begins |", "|---|---|---|", *dict.fromkeys(rows)])
    return f"{table}\n\nThe licences of these data and of the parts above apply."


def _comparison(report: ExportReport) -> str:
    facts = [
        "prompt ids and pixel values are equal",
        "greedy continuations are equal" + ("" if report.same_tokens else " up to ties of the two best tokens"),
        f"logits differ by at most {report.max_abs_diff:.3g} in {report.dtype} (allowed: {report.tolerance:.3g})",
    ]
    if report.merge_max_abs_diff is not None:
        facts.append(f"merging the adapter changed logits by at most {report.merge_max_abs_diff:.3g} in float32")
    if report.rounding_max_abs_diff is not None:
        facts.append(f"rounding to {report.dtype} changed logits by at most {report.rounding_max_abs_diff:.3g}")
    return "; ".join(facts)


def _is_hub_id(name: str) -> bool:
    """`org/name`, and no directory on this machine."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _public(value: str) -> str:
    """A directory is named by its last piece: where it lay is nobody's business."""
    return value if _is_hub_id(value) or "/" not in value else Path(value).name
