"""From real handwriting to a trained, chatting, exported multimodal model, on two CPU cores in minutes.

    python scripts/quickstart.py --out runs/quickstart --seed 0
    python scripts/quickstart.py --out runs/quickstart-media --seed 0 --modalities image,audio,video

The second also makes videos and sounds, and one model for all of it. Every step is an ordinary program of this project
in a process of its own, with the command printed, so each can be tried alone. A step that is done is not done again:
after an interruption the same command goes on. At the end stand tables, `OUT/report.json`, `OUT/chat.png` and
`OUT/rows.html`, a page of rows as the model read them; of the first also what is known from fewer visual tokens
(`OUT/pruning.png`), and what preferences change in a model that was fine-tuned too briefly (`OUT/preference`).
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from mllm.errors import CheckpointError, MllmError, OptionError, user_errors
from mllm.evaluation.digits import TASKS_OF
from mllm.evaluation.quickstart_report import draw_chat, format_table, summarize

ROOT = Path(__file__).resolve().parent.parent
BUDGET = {"data": 12, "backbones": 170, "train": 252, "look": 7, "evaluate": 16} | {
    "prune": 25, "prefer": 100, "export": 12, "chat": 6
}  # fmt: skip
"""Seconds each step may take on two cores: the spine eight minutes, with `prune` and `prefer` ten."""
MEDIA_BUDGET = {"data": 15, "videos": 20, "sounds": 22, "backbones": 290, "whisper": 48} | {
    "train": 450, "look": 8, "evaluate": 35, "chat": 6
}  # fmt: skip
"""With videos and sounds: fifteen minutes. No export: no stock class has three encoders' towers."""
BUDGETS = {"image": BUDGET, "image,audio,video": MEDIA_BUDGET}
PRUNERS, TOKENS = (("visiondrop", "ranking=language"), ("random",), ("uniform",)), (1, 2, 3)
"""How pictures are shown with fewer than their nine tokens, and with how many. This encoder's class token, by which
VisionDrop would rank patches, has learned nothing: the language model ranks them."""
QUESTION = "What is in the picture?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="directory for everything it makes")
    parser.add_argument("--seed", type=int, default=0, help="of the data, the weights and the order of training")
    parser.add_argument(
        "--modalities", default="image", choices=list(BUDGETS), help="what the model reads besides text"
    )
    parser.add_argument("--strict", action="store_true", help="end with status 2 where a threshold is missed")
    args = parser.parse_args()
    with user_errors():
        check_packages(args.modalities)
        report = run(args.out, args.seed, args.modalities)
        if args.strict and report["missed"]:
            raise MllmError(
                f"with seed {args.seed}, missed: {', '.join(report['missed'])}",
                expected="every threshold of the table above",
                do=f"see {args.out / 'report.json'}, and docs/log.md for what was tried",
            )


def check_packages(modalities: str) -> None:
    """Refuse to begin what cannot be ended: videos and sounds need packages that pictures do not.

    Raises:
        OptionError: One is not installed.
    """
    missing = [name for name in ("av", "soundfile", "soxr") if importlib.util.find_spec(name) is None]
    if modalities != "image" and missing:
        raise OptionError(
            f"--modalities {modalities} without {', '.join(missing)}",
            expected="the packages of the extra `data`",
            do="python -m pip install '.[quickstart,data]'",
        )


def run(out: Path, seed: int, modalities: str) -> dict:
    """Do the steps that are not done yet, show what came out, and return it."""
    done, budget = read_steps(out, seed, modalities), BUDGETS[modalities]
    for name in budget:
        if name in done:
            print(f"\n=== {name}: done before, in {done[name]['seconds']:.0f} s")
            continue
        line = command(name, out, seed, modalities)
        print(f"\n=== {name} (budget {budget[name]} s)\n    {' '.join(line)}", flush=True)
        done[name] = run_step(line, says=QUESTION if name == "chat" else None)
        write_json(out / "steps.json", {"seed": seed, "modalities": modalities, "steps": done})
    report = summarize(out, seed=seed, steps=done, budget=budget)
    write_json(out / "report.json", report)
    draw_chat(picture(out), QUESTION, done["chat"]["output"], out / "chat.png")
    print(format_table(report))
    pictures = " ".join(str(path) for path in (out / "chat.png", out / "pruning.png") if path.is_file())
    print(f"\nreport: {out / 'report.json'}    pictures: {pictures}    rows: {out / 'rows.html'}\n\nNext, try:")
    for hint in next_commands(out, modalities):
        print(f"  {hint}")
    return report


def command(name: str, out: Path, seed: int, modalities: str) -> list[str]:
    """The command line of one step."""
    steps = picture_steps(out, seed)
    if modalities != "image":
        steps |= media_steps(out, seed)
    program, *rest = map(str, steps[name])
    return [sys.executable, str(ROOT / program), *rest]


def picture_steps(out: Path, seed: int) -> dict[str, list]:
    """The program of each step, and what it is told."""
    data, parts, model = out / "data", out / "backbones", final_model(out)
    return {
        "data": ["data_recipes/digits.py", "--out", data, "--seed", seed],
        "backbones": ["scripts/train_digit_backbones.py", "--data", data, "--out", parts, "--seed", seed],
        "train": ["train/run.py", "train/configs/quickstart.yaml", "--output_dir", out / "run", "--data_root", data]
        + ["--set", f"model.image.encoder={parts / 'encoder'}", f"model.language_model={parts / 'llm'}"]
        + [f"model.seed={seed}", f"seed={seed}"],
        "look": ["scripts/inspect_data.py", "show", "--data", data / "questions.jsonl", data / "caption.jsonl"]
        + ["--model", model, "--rows", 6, "--html", out / "rows.html"],
        "evaluate": ["scripts/evaluate_model.py", model, "--rows", data / "eval", "--out", out / "evaluation.json"],
        "prune": ["scripts/evaluate_model.py", model, "--rows", data / "eval", "--out", out / "pruning.json"]
        + ["--items", 80, "--no_blank", "--picture", out / "pruning.png"]
        + [word for pruner in PRUNERS for budget in TOKENS for word in ("--pruner", *pruner, f"tokens={budget}")],
        "prefer": ["scripts/digits_preference.py", out, "--out", out / "preference", "--methods", "rdpo"]
        + ["--tasks", "caption", "presence", "--scenes", 480, "--set", "stages.prefer.max_steps=60"],
        "export": ["scripts/export.py", model, "--out", out / "export", "--rows", data / "eval" / "caption.jsonl"],
        "chat": ["scripts/chat.py", model, "--image", picture(out) if (out / "data").exists() else ""],
    }


def media_steps(out: Path, seed: int) -> dict[str, list]:
    """The steps that are others, or there at all, with videos and sounds."""
    data, videos, sounds, parts = out / "data", out / "videos", out / "sounds", out / "backbones"
    lessons = [videos / "lessons.jsonl", sounds / "lessons.jsonl"]
    return {
        "videos": ["data_recipes/digits_videos.py", "--world", data, "--out", videos, "--seed", seed],
        "sounds": ["data_recipes/digits_sounds.py", "--world", data, "--out", sounds, "--seed", seed],
        "backbones": [*picture_steps(out, seed)["backbones"], "--lessons", *lessons],
        "whisper": ["scripts/train_digit_whisper.py", "--data", sounds, "--out", out / "whisper", "--seed", seed],
        "train": ["train/run.py", "train/configs/quickstart_modalities.yaml", "--output_dir", out / "run"]
        + ["--data_root", out, "--set", f"model.image.encoder={parts / 'encoder'}"]
        + [f"model.audio.encoder={out / 'whisper'}", f"model.language_model={parts / 'llm'}"]
        + [f"model.seed={seed}", f"seed={seed}"],
        "look": ["scripts/inspect_data.py", "show", "--data", videos / "videos.jsonl", sounds / "both.jsonl"]
        + ["--model", final_model(out), "--rows", 6, "--html", out / "rows.html"],
        "evaluate": ["scripts/evaluate_model.py", final_model(out), "--rows", data / "eval", videos / "eval"]
        + [sounds / "eval", "--out", out / "evaluation.json", "--tasks"]
        + [task for modality in ("image", "video", "audio") for task in TASKS_OF[modality]],
    }


def run_step(line: list[str], *, says: str | None) -> dict:
    """Run one program; returns its wall seconds, the most memory it held, and its output where it was talked to.

    Raises:
        MllmError: The program failed; what it said stands above.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        line,
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE if says else None,
        stdout=subprocess.PIPE if says else None,
    )
    peak: list[int] = [0]
    threading.Thread(target=watch_memory, args=(process.pid, peak), daemon=True).start()
    output, _ = process.communicate(f"{says}\n" if says else None)
    if process.returncode:
        raise MllmError(
            f"a step ended with status {process.returncode}",
            expected="status 0",
            do="read what it said above; the same command goes on from this step: " + " ".join(line),
        )
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak[0], "output": (output or "").strip()}


def watch_memory(pid: int, peak: list[int]) -> None:
    """Keep in `peak` the most memory that the process, its children and this one have held together."""
    while psutil.pid_exists(pid):
        held = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                held += process.memory_info().rss
            except psutil.Error:
                continue
        peak[0] = max(peak[0], held)
        time.sleep(0.25)


def read_steps(out: Path, seed: int, modalities: str) -> dict[str, dict]:
    """What an earlier run in `out` has done.

    Raises:
        CheckpointError: `out` holds something else, or a run with another seed or other modalities.
    """
    path = out / "steps.json"
    if not path.is_file():
        if out.exists() and any(out.iterdir()):
            raise CheckpointError(
                f"{out} holds files, but no quickstart", expected="a new or empty directory", do="choose another --out"
            )
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, {"seed": seed, "modalities": modalities, "steps": {}})
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["seed"] != seed:
        raise CheckpointError(
            f"{out} holds a quickstart with seed {record['seed']}",
            expected=f"a new directory for seed {seed}",
            do="choose another --out, or the same --seed to go on",
        )
    if (found := record.get("modalities", "image")) != modalities:
        raise CheckpointError(
            f"{out} holds a quickstart with --modalities {found}",
            expected=f"a new directory for {modalities}",
            do="choose another --out, or the same --modalities to go on",
        )
    return record["steps"]


def final_model(out: Path) -> Path:
    """What the last stage of training leaves."""
    return out / "run" / "sft" / "final"


def picture(out: Path) -> Path:
    """The picture of the first evaluation row."""
    rows = out / "data" / "eval" / "caption.jsonl"
    with rows.open(encoding="utf-8") as lines:
        return (rows.parent / json.loads(lines.readline())["media"][0]["path"]).resolve()


def next_commands(out: Path, modalities: str) -> list[str]:
    """What to try now."""
    model = final_model(out)
    lines = [
        f"make demo MODEL={model}                    # chat in the browser",
        f"python scripts/chat.py {model} --image {picture(out)}",
        f"python scripts/chat.py {model} --image {picture(out)} --pruner visiondrop tokens=3",
        f"python scripts/export.py {model} --out my-export --push_to_hub ORG/NAME",
        f"python scripts/inspect_data.py audit --data {out / 'data' / 'caption.jsonl'}",
        "python train/run.py --help",
    ]
    if modalities != "image":
        lines[3] = f"python scripts/chat.py {model} --video {out / 'videos' / 'eval' / 'videos' / '000000.mp4'}"
    return lines


def write_json(path: Path, value: dict) -> None:
    """Write it beside and rename: a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.rename(path)


if __name__ == "__main__":
    main()
