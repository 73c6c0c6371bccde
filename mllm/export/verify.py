"""Hold an export to the model it was made from, in a fresh process that has transformers alone."""

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from mllm.errors import ExportError
from mllm.export import stock_process
from mllm.export.probes import LOGIT_POSITIONS, NEW_TOKENS, Answer

RELATIVE_TOLERANCES = {"float32": 0.0, "bfloat16": 2.0**-7, "float16": 2.0**-10}
"""Largest difference of logits, relative to the largest logit. float32 is exact: export is a renaming. In the short
types a kernel may choose another order of summation from one process to the next; one rounding is allowed for."""


@dataclass(frozen=True)
class Parity:
    """How far an export is from its model, over all probes.

    Args:
        num_probes: How many.
        max_abs_diff: Largest difference of logits.
        tolerance: What it is held to.
        same_prompts: Whether prompt ids are equal.
        same_pixels: Whether pixel values are equal.
        same_tokens: Whether prompt ids and greedy continuations are equal, with their text.
        is_apart_at_ties_only: Whether continuations that differ part where the two best tokens are as good as equal.
            Never the case in float32, whose tolerance is 0.
    """

    num_probes: int
    max_abs_diff: float
    tolerance: float
    same_prompts: bool
    same_pixels: bool
    same_tokens: bool
    is_apart_at_ties_only: bool

    @property
    def is_equal(self) -> bool:
        """Whether the export may be shipped. Written so that a NaN is a difference."""
        is_continued_alike = self.same_tokens or self.is_apart_at_ties_only
        return self.max_abs_diff <= self.tolerance and self.same_prompts and self.same_pixels and is_continued_alike


def verify(directory: Path, expected: list[Answer], *, dtype: str) -> Parity:
    """Reload `directory` in a fresh process and compare its answers with `expected`.

    Logits, ids from the stock processor, pixel values, greedy ids and their text.

    Raises:
        ExportError: It does not load, or it answers otherwise.
    """
    (found,) = stock_answers([directory])
    parity = compare(expected, found, dtype=dtype)
    if parity.is_equal:
        return parity
    raise ExportError(
        f"the export answers otherwise than the model it was made from: {_describe(parity)}",
        expected=f"equal ids, pixels and text, and logits within {parity.tolerance:.3g} ({dtype})",
        do="report this with both directories' config.json; nothing was written",
    )


def stock_answers(directories: list[Path]) -> list[list[Answer]]:
    """Answer the probes stored in each directory, all in one fresh process without mllm.

    Raises:
        ExportError: The process failed; the message holds the end of what it said.
    """
    with tempfile.TemporaryDirectory() as name:
        answers = [Path(name) / f"{number}.safetensors" for number in range(len(directories))]
        request = Path(name) / "request.json"
        fields = {
            "directories": [str(Path(directory).resolve()) for directory in directories],
            "answers": [str(path) for path in answers],
            "threads": torch.get_num_threads(),  # another number sums in another order
            "logit_positions": LOGIT_POSITIONS,
            "new_tokens": NEW_TOKENS,
        }
        request.write_text(json.dumps(fields), encoding="utf-8")
        _run_alone(Path(stock_process.__file__), request)
        return [_read_answers(path) for path in answers]


def compare(expected: list[Answer], found: list[Answer], *, dtype: str) -> Parity:
    """Compare answers probe by probe."""
    pairs = list(zip(expected, found, strict=True))
    tolerance = RELATIVE_TOLERANCES[dtype] * max(float(answer.logits.abs().max()) for answer in expected)
    is_same = [ours.greedy_ids == stock.greedy_ids and ours.greedy_text == stock.greedy_text for ours, stock in pairs]
    same_prompts = all(ours.input_ids == stock.input_ids for ours, stock in pairs)
    return Parity(
        num_probes=len(pairs),
        max_abs_diff=max_difference(*zip(*((ours.logits, stock.logits) for ours, stock in pairs), strict=True)),
        tolerance=tolerance,
        same_prompts=same_prompts,
        same_pixels=all(_is_same(ours.pixel_values, stock.pixel_values) for ours, stock in pairs),
        same_tokens=same_prompts and all(is_same),
        is_apart_at_ties_only=all(
            same or _part_at_a_tie(ours, stock, tolerance) for same, (ours, stock) in zip(is_same, pairs, strict=True)
        ),
    )


def max_difference(left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> float:
    """Largest absolute difference over pairs of tensors; infinite where shapes differ, NaN where a NaN is met."""
    worst = 0.0
    for ours, theirs in zip(left, right, strict=True):
        if ours.shape != theirs.shape:
            return math.inf
        difference = float((ours.double() - theirs.double()).abs().max())
        if not difference <= worst:
            worst = difference
        if math.isnan(worst):
            return worst
    return worst


def _run_alone(script: Path, request: Path) -> None:
    """Run `script` with neither its folder nor the working directory on the module path, and without a network."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-P", str(script), str(request)]
    done = subprocess.run(
        command, env=os.environ | offline, cwd=request.parent, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ExportError(
            f"the export could not be used by transformers alone: {done.stderr.strip()[-2000:]}",
            expected="a directory that stock transformers loads and runs",
            do="report this with the directory's config.json; nothing was written",
        )


def _read_answers(path: Path) -> list[Answer]:
    with safe_open(path, framework="pt") as file:
        texts = json.loads(file.metadata()["greedy_texts"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return [
        Answer(
            input_ids=tensors[f"{number}.input_ids"].tolist(),
            pixel_values=tensors.get(f"{number}.pixel_values"),
            logits=tensors[f"{number}.logits"],
            greedy_ids=tensors[f"{number}.greedy_ids"].tolist(),
            margins=tensors[f"{number}.margins"].tolist(),
            greedy_text=text,
        )
        for number, text in enumerate(texts)
    ]


def _is_same(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    """Whether pixels are equal, after the rounding to the model's type that the model does itself."""
    if left is None or right is None:
        return left is right
    return torch.equal(left.to(right.dtype), right)


def _part_at_a_tie(ours: Answer, stock: Answer, tolerance: float) -> bool:
    """Whether two continuations first differ where, on both sides, the best two tokens are within the tolerance.

    Twice the tolerance: each of the two logits may be off by it. The cache and the batch give such rounding even where
    the prompt's logits are equal.
    """
    pairs = zip(ours.greedy_ids, stock.greedy_ids, strict=False)
    at = next((step for step, (one, other) in enumerate(pairs) if one != other), None)
    return at is not None and tolerance > 0 and max(ours.margins[at], stock.margins[at]) <= 2 * tolerance


def _describe(parity: Parity) -> str:
    facts = {
        "prompt ids": parity.same_prompts,
        "pixels": parity.same_pixels,
        "continuations": parity.same_tokens or parity.is_apart_at_ties_only,
    }
    unequal = [name for name, is_same in facts.items() if not is_same]
    return f"logits differ by up to {parity.max_abs_diff:.3g}" + "".join(f", {name} differ" for name in unequal)
