"""Run a plan: assemble a model, then train it in stages, each a process of its own.

    python train/run.py PLAN.yaml --output_dir OUT

The same command again skips finished stages and goes on with an interrupted one.
"""

import argparse
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import torch
import yaml
from tqdm import tqdm
from transformers.utils import logging

from mllm.errors import MllmError, OptionError, user_errors
from mllm.training.plan import Stage, read_plan
from mllm.training.plan_progress import PlanProgress
from mllm.training.sharding import check_launcher

HERE = Path(__file__).parent
EXAMPLE = """example of a plan:

  model:                                  # what is assembled, once, into OUT/assembled
    language_model: lmsys/vicuna-7b-v1.5  # Hub ids, or directories relative to the current one
    image: {encoder: openai/clip-vit-large-patch14-336, connector: mlp}
  seed: 0                                 # options that all stages share
  stages:
    - name: align                         # any options of train/sft.py; relative row files stand beside the plan
      parts: {image.connector: full}
      data: [captions.jsonl]
      learning_rate: 1.0e-3
    - name: sft                           # starts from OUT/align/final
      parts: {image.connector: full, text: {mode: lora, rank: 128, alpha: 256}}
      data: [conversations.jsonl]
    - name: prefer                        # options of train/rdpo.py; the model before it is the reference
      program: rdpo
      parts: {text: {mode: lora, rank: 128, alpha: 256}}
      data: [preferences.jsonl]

  python train/run.py plan.yaml --output_dir OUT --data_root rows --set seed=1 stages.sft.max_steps=100

Each stage leaves OUT/STAGE/stage.yaml (its options, resolved) and OUT/STAGE/final (the model; where that is an
adapter, the next stage starts from it merged, in OUT/NEXT/base). OUT/plan.json says how each stage went. A finished
stage is skipped only while its options, row files and input are what they were; else nothing is touched.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        "train/run.py", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, single = parser.add_argument, HERE / "accelerate" / "single.yaml"
    changes = "change the plan: seed=1, model.image.encoder=DIR, stages.sft.parts.text.rank=8"
    add("plan", type=Path, help="YAML file with `model` and `stages`")
    add("--output_dir", type=Path, required=True, help="directory for everything the plan makes")
    add("--data_root", type=Path, help="where relative row files are, by default beside the plan")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY.PATH=VALUE", help=changes)
    add("--accelerate_config", type=Path, default=single, help="see train/accelerate; by default one process")
    add("--dry_run", action="store_true", help="check everything, show what is done, start nothing")
    logging.disable_progress_bar()
    # Terminated is treated as Ctrl-C: the stage's processes end, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with user_errors():
            run(parser.parse_args())
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; the same command goes on from the newest checkpoint\n")
        raise SystemExit(130) from None


def run(args: argparse.Namespace) -> None:
    """Assemble, run what is not finished, show how it went."""
    with tqdm(desc="reading data", unit="row", mininterval=0.5, delay=1) as bar:
        plan = read_plan(
            args.plan, output_dir=args.output_dir, data_root=args.data_root, changes=args.set, progress=bar.update
        )
    progress = PlanProgress(plan)
    launcher = launch_command(args.accelerate_config)
    if not args.dry_run:
        progress.assemble()
        for stage in plan.stages:
            if progress.is_done(stage):
                print(f"\n=== {stage.name}: finished before, {stage.final}", flush=True)
                continue
            command = [*launcher, str(HERE / f"{stage.program}.py"), "--config", str(stage.config)]
            print(f"\n=== {stage.name}\n    {shlex.join(command)}", flush=True)
            with progress.attempt(stage):
                launch(command, stage)
    print(f"\n{progress.table()}")


def launch_command(config: Path) -> list[str]:
    """`accelerate launch` with a configuration, and the threads it would otherwise settle with a warning."""
    if not config.is_file():
        raise OptionError(f"--accelerate_config {config} is not there", expected="a YAML file", do="correct it")
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    check_launcher(content, has_gpu=torch.accelerator.is_available())
    processes = content.get("num_processes", 1)
    threads = max(1, torch.get_num_threads() // processes)
    accelerate = [sys.executable, str(HERE / "launch.py")]
    return [*accelerate, "--config_file", str(config), "--num_cpu_threads_per_process", str(threads)]


def launch(command: list[str], stage: Stage) -> None:
    """Run one stage and wait; when this process is stopped, its processes are."""
    process = subprocess.Popen(command)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        started = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in started:
            one.terminate()
        for one in psutil.wait_procs(started, timeout=20)[1]:
            one.kill()
        raise
    if status:
        raise MllmError(
            f"stage {stage.name!r} ended with status {status}",
            expected="status 0",
            do="read what it said above; the same command skips finished stages and goes on with this one",
        )


if __name__ == "__main__":
    main()
