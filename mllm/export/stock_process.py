"""Answer stored probes with transformers alone. `verify.py` runs this file by path, in a process of its own.

It stands for whoever loads an export without ever having heard of mllm, so it imports nothing of it and says so with a
check. Usage: python stock_process.py REQUEST.json, with {"directories": [...], "answers": [...], "threads": N,
"logit_positions": N, "new_tokens": N}; the answers to directory i go to the safetensors file i.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    LogitsProcessor,
    LogitsProcessorList,
)


def main() -> None:
    """Answer the probes of every directory in the request."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    for directory, answers in zip(request["directories"], request["answers"], strict=True):
        tensors, facts = answer(Path(directory), request["logit_positions"], request["new_tokens"])
        save_file(tensors, answers, metadata=facts)
    if any(name.partition(".")[0] == "mllm" for name in sys.modules):
        raise SystemExit("mllm was imported by the process that has to do without it")


def answer(directory: Path, logit_positions: int, new_tokens: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Load `directory` as its users will and answer the probes stored in it."""
    model, loaded = AutoModelForImageTextToText.from_pretrained(directory, dtype="auto", output_loading_info=True)
    if wrong := {key: sorted(map(str, names)) for key, names in loaded.items() if names}:
        raise SystemExit(f"{directory} does not load cleanly: {wrong}")
    processor = AutoProcessor.from_pretrained(directory)
    # What transformers takes without torchvision, and what models are trained with; torchvision rounds otherwise.
    processor.image_processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    probes = json.loads((directory / "probes" / "probes.json").read_text(encoding="utf-8"))
    inputs = [prepare(processor, probe, directory / "probes").to(dtype=model.dtype) for probe in probes]
    tensors = {}
    for number, one in enumerate(inputs):
        with torch.no_grad():
            tensors[f"{number}.logits"] = model(**one, logits_to_keep=logit_positions).logits[0].contiguous()
        tensors[f"{number}.input_ids"] = one["input_ids"][0]
        if "pixel_values" in one:
            tensors[f"{number}.pixel_values"] = one["pixel_values"].contiguous()
    texts = []
    for number, (ids, margins) in enumerate(continue_greedily(model, inputs, new_tokens)):
        tensors |= {f"{number}.greedy_ids": ids, f"{number}.margins": margins}
        texts.append(processor.decode(ids, skip_special_tokens=True))
    return tensors, {"architecture": type(model).__name__, "greedy_texts": json.dumps(texts)}


def continue_greedily(model, inputs: list[dict], new_tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Greedy continuations with their end tokens, and by how much each token was the best.

    Prompts are padded on the left and continued 16 at a time.

    Both sides of the comparison call this: equal batches make equal sums.
    """
    settings = model.generation_config
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    found = []
    for start in range(0, len(inputs), 16):
        batch = inputs[start : start + 16]
        length = max(one["input_ids"].shape[1] for one in batch)
        input_ids = torch.full((len(batch), length), settings.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, one in enumerate(batch):
            width = one["input_ids"].shape[1]
            input_ids[row, length - width :] = one["input_ids"][0]
            attention_mask[row, length - width :] = 1
        pixels = [one["pixel_values"] for one in batch if "pixel_values" in one]
        media = {"pixel_values": torch.cat(pixels)} if pixels else {}
        recorder = MarginRecorder()
        with torch.no_grad():
            ids = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                **media,
                do_sample=False,
                max_new_tokens=new_tokens,
                logits_processor=LogitsProcessorList([recorder]),
            )
        for row, margins in zip(ids[:, length:], torch.stack(recorder.margins, dim=1), strict=True):
            said = up_to_end(row, ends)
            found.append((said, margins[: len(said)].clone()))
    return found


class MarginRecorder(LogitsProcessor):
    """Notes at every step by how much the best token's logit is above the second best's; changes nothing."""

    def __init__(self) -> None:
        self.margins: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take the two best logits of each row."""
        best = scores.float().topk(2).values
        self.margins.append(best[:, 0] - best[:, 1])
        return scores


def up_to_end(ids: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """What was said, with the first end token, without the padding after it."""
    at = torch.isin(ids, torch.tensor(ends)).nonzero()
    return ids[: int(at[0]) + 1].clone() if len(at) else ids.clone()


def prepare(processor, probe: dict, folder: Path):
    """Ids and pixels by the stock processor's one call, images from the files next to the probes."""
    images = iter(probe["images"])
    messages = [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": Image.open(folder / next(images))} if item["type"] == "image" else item
                for item in message["content"]
            ],
        }
        for message in probe["messages"]
    ]
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


if __name__ == "__main__":
    main()
