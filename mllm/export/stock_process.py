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
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor


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
    tensors, texts = {}, []
    for number, probe in enumerate(json.loads((directory / "probes" / "probes.json").read_text(encoding="utf-8"))):
        inputs = prepare(processor, probe, directory / "probes").to(dtype=model.dtype)
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            logits = model(**inputs, logits_to_keep=logit_positions).logits[0]
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)[0, length:]
        tensors[f"{number}.input_ids"] = inputs["input_ids"][0]
        tensors[f"{number}.logits"] = logits.contiguous()
        tensors[f"{number}.greedy_ids"] = ids.contiguous()
        if "pixel_values" in inputs:
            tensors[f"{number}.pixel_values"] = inputs["pixel_values"].contiguous()
        texts.append(processor.decode(ids, skip_special_tokens=True))
    return tensors, {"architecture": type(model).__name__, "greedy_texts": json.dumps(texts)}


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
