"""Model FLOPs utilisation: the arithmetic that the rows need, per second, beside what the device can do."""

import statistics
from typing import Any

from training_benchmark.checkpoints import IMAGE_SIZE, PATCH, SHAPES, num_key_value_heads

PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12}
"""Dense bfloat16, from NVIDIA's data sheets; the first name that the device's contains."""


def of_both(found: dict[str, Any], tokens: dict[str, Any], plan: dict[str, Any], device: str) -> dict[str, Any]:
    """Samples a second, peak memory and utilisation of each side. The arithmetic counted is the same for both."""
    flops = sum(
        flops_of_row(SHAPES[plan["shape"]], length=length, supervised=supervised, images=images)
        for length, supervised, images in zip(
            tokens["row_lengths"], tokens["supervised"], tokens["images"], strict=True
        )
    )
    peak = next((value for name, value in PEAK_FLOPS.items() if name in device), None)
    sides = {}
    for name, trials in found["trials"]["final"].items():
        seconds = statistics.median(one["train_seconds"] for one in trials)
        sides[name] = {
            "samples_per_second": found["rows_per_second"][name],
            "cuda_peak_mib": max(one["cuda_peak_mib"] for one in trials),
            "model_flops_utilisation": None if peak is None else flops / seconds / peak,
        }
    return {"device": device, "flops_of_epoch": flops, "sides": sides}


def flops_of_row(shape: dict[str, Any], *, length: int, supervised: int, images: int) -> float:
    """Multiplications and additions that a row cannot do without: no padding, no position that is not learned.

    A frozen encoder costs its forward; language model and head cost theirs three times, backward included. Attention
    over a causal half.
    """
    text, vision = shape["text"], shape["vision"]
    width, kv_share = text["hidden_size"], num_key_value_heads(text["heads"]) / text["heads"]
    layer = width * width * (2 + 2 * kv_share) + 3 * width * text["intermediate_size"]
    causal = 2 * width * length / 2
    language = 3 * 2 * length * text["layers"] * (layer + causal)
    head = 3 * 2 * supervised * width * text["vocab_size"]
    patches = (vision.get("image_size", IMAGE_SIZE) // vision.get("patch", PATCH)) ** 2 + 1
    vision_layer = 4 * vision["hidden_size"] ** 2 + 2 * vision["hidden_size"] * vision["intermediate_size"]
    encoder = 2 * images * patches * vision["layers"] * (vision_layer + 2 * vision["hidden_size"] * patches)
    return language + head + encoder
