"""`train/run.py` with stages that run in this process."""

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TRAIN = Path(__file__).parents[2] / "train"


@pytest.fixture(scope="session")
def run_program() -> ModuleType:
    """`train/run.py` as a module."""
    return _load("run")


@pytest.fixture(scope="session")
def train_by_hand():
    """Do what `train/sft.py` does with these arguments, in this process."""
    from mllm.training.arguments import parse_arguments

    run = _load("sft").run
    return lambda argv: run(parse_arguments(argv))


@pytest.fixture(scope="session")
def run_plan(run_program, train_by_hand):
    """Do what `train/run.py` does, without a process for each stage; returns the names of the stages started."""

    def start(plan: Path, output_dir: Path, *changes: str, data_root: Path | None = None, dry_run=False) -> list[str]:
        started = []

        def launch(command, stage):
            started.append(stage.name)
            train_by_hand(command[command.index(str(TRAIN / "sft.py")) + 1 :])

        single = TRAIN / "accelerate" / "single.yaml"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_program, "launch", launch)
            run_program.run(
                argparse.Namespace(
                    plan=plan, output_dir=output_dir, data_root=data_root, set=list(changes), accelerate_config=single,
                    dry_run=dry_run,
                )
            )  # fmt: skip
        return started

    return start


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"program_{name}", TRAIN / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
