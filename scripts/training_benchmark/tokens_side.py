"""Do both sides read the same rows, and learn the same tokens? And how long are they?"""

from typing import Any

from training_benchmark import our_side, trl_side
from training_benchmark.mixture import describe_lengths

IGNORED = -100
NUM_EPOCHS = 8
"""Of how many the order is told."""


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Encode every row on both sides, alone, and compare ids and labels one by one."""
    theirs = trl_side.supervised_rows(spec)
    ours, facts, orders = our_side.encoded_rows(spec, num_epochs=NUM_EPOCHS)
    lengths = [len(ids) for ids, _ in ours]
    supervised = [count_supervised(labels) for _, labels in ours]
    found = {
        "rows": len(ours),
        "rows_of_trl": len(theirs),
        "rows_with_equal_ids": sum(one[0] == other[0] for one, other in zip(ours, theirs, strict=True)),
        "rows_with_equal_labels": sum(one[1] == other[1] for one, other in zip(ours, theirs, strict=True)),
        "supervised_tokens": sum(supervised),
        "supervised_tokens_of_trl": sum(count_supervised(labels) for _, labels in theirs),
        "lengths": describe_lengths(lengths, supervised, [source for source, _ in facts]),
        "orders": orders,
        "row_lengths": lengths,
        "supervised": supervised,
        "images": [num_images for _, num_images in facts],
    }
    return {"tokens": found}


def count_supervised(labels: list[int]) -> int:
    """Labels that a loss is computed of: the first token has nothing in front of it."""
    return sum(label != IGNORED for label in labels[1:])
