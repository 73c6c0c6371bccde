"""What a quickstart ends with: one JSON report, one table, one picture."""

import json
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mllm.evaluation import preference_report, pruning_report

THRESHOLDS = {
    "caption_digit_recall": 0.88,
    "caption_digit_precision": 0.88,
    "caption_color_accuracy": 0.97,
    "position_accuracy": 0.85,
    "count_accuracy": 0.85,
    "presence_f1": 0.80,
    "color_accuracy": 0.80,
}
"""What every seed has to reach on unseen handwriting."""
MEDIA_THRESHOLDS = {
    "motion_accuracy": 0.90,
    "order_accuracy": 0.80,
    "beeps_accuracy": 0.90,
    "glide_accuracy": 0.95,
    "tones_accuracy": 0.90,
    "match_accuracy": 0.60,
}
"""And, of a quickstart with videos and sounds, on unseen ones. Whether there are as many beeps as digits is hard for a
model so small: it has to know more than chance, by more than three standard errors of 300 answers."""
COPIED = ("max_abs_diff", "same_tokens", "num_probes", "num_parameters")
COMPARED = ("hallucinated_mentions", "hallucinated_captions", "mentioned_recall", "presence_f1")
"""What is shown of a model before preference training and after it."""


def summarize(out: Path, *, seed: int, steps: dict[str, dict], budget: dict[str, int]) -> dict[str, Any]:
    """Gather what the steps measured.

    Args:
        out: Directory of the quickstart, with `evaluation.json`, and of the steps it has `export/export_report.json`,
            `pruning.json` and `preference/report.json`.
        seed: The run's seed.
        steps: Seconds and peak memory of each step.
        budget: Seconds each step may take.
    """
    evaluation = _read(out / "evaluation.json")["tasks"]
    report: dict[str, Any] = {"seed": seed}
    for task in evaluation.values():
        for name, value in task["model"].items():
            report[name] = value
            report[f"{name}_baseline"] = task["baseline"][name]
            report[f"{name}_items"] = task["items"]
    if "export" in budget:
        export = _read(out / "export" / "export_report.json")
        report |= {f"export_{name}": export[name] for name in COPIED}
    if "prune" in budget:
        report["pruning"] = _pruning(_read(out / "pruning.json"))
    if "prefer" in budget:
        mean = _read(out / "preference" / "report.json")["mean"]
        report["preference"] = {model: {name: scores[name] for name in COMPARED} for model, scores in mean.items()}
    report["parameters"] = _read(out / "backbones" / "report.json").get("parameters", {})
    if "whisper" in budget:
        report["parameters"]["audio_encoder"] = _read(out / "whisper" / "report.json")["parameters"]
    report["seconds"] = {name: round(steps[name]["seconds"], 1) for name in budget}
    report["seconds_total"] = round(sum(step["seconds"] for step in steps.values()), 1)
    report["seconds_budget"] = budget
    report["peak_gigabytes"] = round(max(step["peak_bytes"] for step in steps.values()) / 1e9, 2)
    wanted = THRESHOLDS if "videos" not in budget else THRESHOLDS | MEDIA_THRESHOLDS
    report["thresholds"] = wanted
    report["missed"] = [name for name, least in wanted.items() if report[name] < least]
    return report


def format_table(report: dict[str, Any]) -> str:
    """The report as text that fits a terminal."""
    lines = [f"{'on unseen items':<28}{'model':>8}{'at least':>10}{'blank or constant':>20}{'items':>8}"]
    for name, least in report["thresholds"].items():
        mark = "" if report[name] >= least else "   missed"
        lines.append(
            f"{name:<28}{report[name]:>8.3f}{least:>10.2f}{report[f'{name}_baseline']:>20.3f}"
            f"{report[f'{name}_items']:>8}{mark}"
        )
    if "export_same_tokens" in report:
        same = "the same tokens" if report["export_same_tokens"] else "OTHER TOKENS"
        lines += ["", f"export to stock transformers: logits differ by {report['export_max_abs_diff']:.1g}, {same}"]
    lines += [*_pruning_lines(report), *_preference_lines(report), "", *_seconds_lines(report)]
    lines.append(f"\nmost memory held by all processes together: {report['peak_gigabytes']} GB")
    return "\n".join(lines)


def draw_chat(image: Path, question: str, answer: str, out: Path) -> None:
    """One picture with its question and the model's answer, as a PNG."""
    side, margin = 384, 24
    words = ImageFont.load_default(size=22)
    lines = textwrap.wrap(question, 40), textwrap.wrap(answer, 40)
    height = side + 2 * margin
    canvas = Image.new("RGB", (side + 3 * margin + 460, height), (250, 250, 248))
    with Image.open(image) as scene:
        canvas.paste(scene.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (margin, margin))
    draw = ImageDraw.Draw(canvas)
    x, y = side + 2 * margin, margin
    for who, text, colour in (("question", lines[0], (90, 90, 90)), ("answer", lines[1], (20, 60, 140))):
        draw.text((x, y), who, font=ImageFont.load_default(size=15), fill=(150, 150, 150))
        draw.multiline_text((x, y + 22), "\n".join(text), font=words, fill=colour, spacing=8)
        y += 22 + 34 * len(text) + 26
    canvas.save(out)


def _pruning(evaluation: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation under pruners holds, without each task's metrics."""
    wanted = ("pruner", "method", "tokens", "seen", "of", "accuracy", "kept")
    return {
        "accuracy": evaluation["accuracy"],
        "items": sum(task["items"] for task in evaluation["tasks"].values()),
        "cases": [{name: case[name] for name in wanted} for case in evaluation["pruned"]],
    }


def _pruning_lines(report: dict[str, Any]) -> list[str]:
    if "pruning" not in report:
        return []
    found = report["pruning"]
    table = pruning_report.format_table(found["cases"], unpruned=found["accuracy"])
    return ["", f"accuracy from fewer visual tokens, {found['items']} items of all kinds", table]


def _preference_lines(report: dict[str, Any]) -> list[str]:
    """What preferences changed, and of what model: not of the one in the first table."""
    if "preference" not in report:
        return []
    models = report["preference"]
    lines = ["", "preferences, for a model fine-tuned too briefly: " + "".join(f"{name:>11}" for name in models)]
    for name in COMPARED:
        cells = "".join(f"{scores[name]:>11.3f}" for scores in models.values())
        lines.append(f"{preference_report.SHOWN[name]:<49}{cells}")
    return lines


def _seconds_lines(report: dict[str, Any]) -> list[str]:
    spent = (*report["seconds"].values(), report["seconds_total"])
    allowed = (*report["seconds_budget"].values(), sum(report["seconds_budget"].values()))
    return [
        "".join(f"{name:>10}" for name in (*report["seconds"], "total")) + "   seconds",
        "".join(f"{value:>10.0f}" for value in spent) + "   taken",
        "".join(f"{value:>10}" for value in allowed) + "   budget",
    ]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
