"""`train/run.py` with stages that run in this process, and shipped plans made small."""

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

TRAIN = Path(__file__).parents[2] / "train"

# What a plan's parts are on the Hub, by what their names hold, and of which family the tiny ones are.
LANGUAGE_MODELS = {"opt-": "opt", "Qwen": "qwen2"}
ENCODERS = {
    "siglip": "siglip_vision_model", "dinov2": "dinov2", "convnext": "convnext", "blip2": "blip-2",
    "whisper": "whisper", "clap": "clap",
}  # fmt: skip
TOKENIZERS = {"chatml": "qwen", "vicuna_v1": "llama2", "plain": "gpt_neox"}


@pytest.fixture(scope="session")
def run_program() -> ModuleType:
    """`train/run.py` as a module."""
    return _load("run")


@pytest.fixture(scope="session")
def train_by_hand():
    """Do what `train/sft.py`, or another of the programs, does with these arguments, in this process."""
    from mllm.training.arguments import parse_arguments
    from mllm.training.plan import PROGRAMS

    def start(argv: list[str], program: str = "sft") -> None:
        _load(program).run(parse_arguments(argv, PROGRAMS[program]))

    return start


@pytest.fixture(scope="session")
def run_plan(run_program, train_by_hand):
    """Do what `train/run.py` does, without a process for each stage; returns the names of the stages started."""

    def start(plan: Path, output_dir: Path, *changes: str, data_root: Path | None = None, dry_run=False) -> list[str]:
        started = []

        def launch(command, stage):
            started.append(stage.name)
            program = str(TRAIN / f"{stage.program}.py")
            train_by_hand(command[command.index(program) + 1 :], stage.program)

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


@pytest.fixture(scope="session")
def tiny_model_options():
    """The `model:` of a shipped plan with tiny parts of the same families in place of those on the Hub."""
    from mllm.testing import save_tiny_parts

    def make(directory: Path, plan: Path) -> dict[str, Any]:
        model = yaml.safe_load(plan.read_text(encoding="utf-8"))["model"]
        tokenizer = TOKENIZERS[model.get("chat_template")]
        llm = next((family for name, family in LANGUAGE_MODELS.items() if name in model["language_model"]), "llama")
        language_model = save_tiny_parts(directory / "parts", llm=llm, tokenizer=tokenizer)["language_model"]
        towers = {
            kind: _tiny(tower, directory / kind) if isinstance(tower, dict) else tower
            for kind, tower in model.items()
            if kind in ("image", "audio", "video")
        }
        return model | towers | {"language_model": language_model}

    return make


@pytest.fixture(scope="session")
def tiny_plan_rows():
    """Rows of all media that a shipped plan's model reads, some without any."""
    from mllm.testing import save_tiny_rows
    from mllm.testing_media import save_tiny_media_rows

    def make(directory: Path, plan: Path) -> Path:
        model = yaml.safe_load(plan.read_text(encoding="utf-8"))["model"]
        letters = [kind[0] for kind in ("image", "audio", "video") if kind in model]
        if letters == ["i"]:
            return save_tiny_rows(directory / "rows")
        return save_tiny_media_rows(directory / "rows", [*letters, *letters, "".join(letters), ""])

    return make


@pytest.fixture(scope="session")
def tiny_stage_parts():
    """The `parts:` of a stage, as YAML, for encoders of two layers."""

    def make(stage: dict[str, Any]) -> str:
        parts = {
            name: {**chosen, "layers": "1:"} if isinstance(chosen, dict) and "layers" in chosen else chosen
            for name, chosen in stage["parts"].items()
        }
        return yaml.safe_dump(parts, default_flow_style=True, width=10_000)

    return make


@pytest.fixture(scope="session")
def tiny_changes(tiny_model_options, tiny_plan_rows, tiny_stage_parts):
    """What `--set` is told to run a shipped plan here: other parts, rows and numbers of them, and nothing else."""

    def make(directory: Path, plan: Path) -> list[str]:
        options, rows = tiny_model_options(directory, plan), tiny_plan_rows(directory, plan)
        changes = [
            f"model={yaml.safe_dump(options, default_flow_style=True, width=10_000)}",
            "use_cpu=true",
            "logging_steps=1",
        ]
        for stage in yaml.safe_load(plan.read_text(encoding="utf-8"))["stages"]:
            small = {"data": f"[{rows}]", "parts": tiny_stage_parts(stage), "max_steps": 2, "warmup_steps": 1}
            small |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "dataloader_num_workers": 0}
            changes += [f"stages.{stage['name']}.{key}={value}" for key, value in small.items()]
        return changes

    return make


def _tiny(value: Any, directory: Path) -> Any:
    """A tower's options with small parts; `directory` is where they are made."""
    if isinstance(value, list):
        return [_tiny(entry, directory / str(number)) for number, entry in enumerate(value)]
    if isinstance(value, str):
        return _tiny_encoder(value, directory)
    small = dict(value)
    if "encoder" in small:
        small["encoder"] = _tiny(small["encoder"], directory / "encoder")
    if "window_seconds" in small:
        small["window_seconds"] = 0.25
    if "image_size" in small:
        small["image_size"] = 16
    if "qformer" in str(small.get("connector")):
        small["connector"] = _tiny_qformer(small["connector"], directory)
    return small


def _tiny_encoder(path: str, directory: Path) -> str:
    from mllm.testing_images import save_tiny_image_encoder
    from mllm.testing_sounds import save_tiny_audio_encoder

    family = next((family for name, family in ENCODERS.items() if name in path), "clip_vision_model")
    save = save_tiny_audio_encoder if family in ("whisper", "clap") else save_tiny_image_encoder
    return save(directory, family)


def _tiny_qformer(options: dict[str, Any], directory: Path) -> dict[str, Any]:
    from mllm.testing_images import NUM_QUERIES

    small = {
        **options,
        "layers": 2,
        "hidden_size": 32,
        "heads": 4,
        "intermediate_size": 48,
        "num_queries": NUM_QUERIES,
    }
    if "init_from" in options:
        small["init_from"] = _tiny_encoder(options["init_from"], directory / "start")
    if "tokenizer" in options:
        _bert_tokenizer().save_pretrained(directory / "words")
        small |= {"tokenizer": str(directory / "words"), "max_question_tokens": 16}
    return small


def _bert_tokenizer():
    """Built as BERT's is: words, [CLS] before them and [SEP] behind."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "is", "number", "?"]
    backend = Tokenizer(WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = BertPreTokenizer()
    backend.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"program_{name}", TRAIN / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
