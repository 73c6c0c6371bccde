"""Two ranks == one process, where each of them lacks kinds of media that the other has; plainly, and under ZeRO.

Both ranks really run, over gloo. In the first step one has images and the other videos, which one encoder reads; then
one has sounds, and the other text alone; then both have all kinds, of unequal numbers. A module that only one of them
calls, or a parameter that waits for a gradient, would hang or stop them.
"""

import json
import os
import runpy
from pathlib import Path

import pytest
import torch

from mllm import load_model
from mllm.assemble import assemble_checkpoint
from mllm.data.batch_plan import rank_batches
from mllm.data.order import every_row_once
from mllm.load import merged
from mllm.testing import save_tiny_parts
from mllm.testing_media import save_tiny_media_rows

QFORMER = {
    "type": "qformer", "num_queries": 3, "layers": 2, "hidden_size": 16, "heads": 2, "intermediate_size": 32,
    "cross_attention_frequency": 1, "dropout": 0.0,
}  # fmt: skip
TOWERS = {
    "apart": {
        "image": {"connector": "linear"},
        "audio": {"connector": {**QFORMER, "per": "item", "positions": 3}},
        "video": {"connector": {"type": "pool", "over": "grid", "size": 2}, "frames": "cap:3:8", "timestamps": True},
    },
    "images in tiles": {
        "image": {"connector": "linear", "tiles": {"type": "llava_next", "grids": [[1, 2], [2, 1], [2, 2]]}},
        "audio": {"connector": "linear"},
        "video": {"connector": "linear", "frames": "cap:3:8"},
    },
    "frames through the image connector": {
        "image": {"connector": QFORMER},
        "audio": {"connector": {"type": "pool", "size": 4}},
        "video": {
            "connector": {**QFORMER, "per": "item", "positions": 8},
            "frames": "cap:3:8",
            "through_image_connector": True,
        },
    },
}
CONNECTORS = {f"{kind}.connector": "full" for kind in ("image", "audio", "video")}
RUNS = {
    "all parts, view by view": {
        "parts": {**CONNECTORS, "image.encoder": "full", "audio.encoder": "full", "text": "full"},
        "encoder_chunk": 1,
    },
    "connectors": {"parts": CONNECTORS},
    "lora beside some": {
        "parts": {"image.encoder": "full", "video.connector": "full", "text": {"mode": "lora", "rank": 4}},
    },
    "image connector": {"parts": {"image.connector": "full"}},
    "video connector": {"parts": {"video.connector": "full"}},
}
STEPS = [("i", "v"), ("a", ""), ("vatii", "iav")]
"""What the rows of the first and of the second rank hold, step by step."""
OPTIONS = {"optim": "sgd", "max_steps": 5, "logging_steps": 1, "encoder_chunk": None}


@pytest.fixture(scope="module")
def lacking(tmp_path_factory) -> Path:
    """Twelve rows: in the first epoch as `STEPS` has it, in the second in another order."""
    contents = [""] * 12
    for rank in range(2):
        for batch, kinds in zip(
            rank_batches(every_row_once(12)(0, 42), batch_size=2, rank=rank, world_size=2), STEPS, strict=True
        ):
            for row in batch:
                contents[row] = kinds[rank]
    return save_tiny_media_rows(tmp_path_factory.mktemp("lopsided") / "rows", contents)


@pytest.mark.parametrize(
    ("towers", "stage"),
    [
        pytest.param(towers, stage, marks=() if (towers, stage) == ("apart", "plain") else pytest.mark.slow)
        for towers in TOWERS
        for stage in ("plain", "zero2", "zero3")
    ],
)
def test_two_ranks_equal_one_process(train, lacking, two_ranks, tmp_path, towers, stage):
    model = assemble_checkpoint(tmp_path / "model", **save_tiny_parts(tmp_path / "parts", **TOWERS[towers]))
    options = OPTIONS | {"model": str(model), "data": [str(lacking)]}
    for name, own in RUNS.items():
        train(tmp_path / name / "one", **options | own, per_device_train_batch_size=4)
    two_ranks(_train_all, train, options, tmp_path, stage)
    before = load_model(model).state_dict()
    for name, own in RUNS.items():
        one, two = (merged(load_model(tmp_path / name / run / "final")).state_dict() for run in ("one", "two"))
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-5, msg=f"{name}: {key}")
        assert _losses(tmp_path / name / "one") == pytest.approx(_losses(tmp_path / name / "two"), abs=1e-5)
        changed = {key for key in one if not torch.equal(one[key], before[key])}
        for part in own["parts"]:
            kind, _, place = part.partition(".")
            root = f"model.{kind}_tower.{place}" if place else "model.language_model"
            assert any(key.startswith(root) for key in changed), f"{name}: {part} was not trained"


def _train_all(train, options: dict, root: Path, stage: str) -> None:
    """In each rank."""
    if stage != "plain":
        runpy.run_path(str(Path(__file__).parent / "test_sharded.py"))["_be_launched"](stage)
    for name, own in RUNS.items():
        train(root / name / "two", **options | own)


def test_a_prompt_without_media_is_answered_beside_one_with_them(two_ranks, tmp_path):
    """Under ZeRO-3 both ranks call each tower, before either of them speaks."""
    model = assemble_checkpoint(
        tmp_path / "model", **save_tiny_parts(tmp_path / "parts", **TOWERS["frames through the image connector"])
    )
    lines = save_tiny_media_rows(tmp_path / "rows", ["iav", ""]).read_text().splitlines()
    questions = [[_with_files(json.loads(line), tmp_path / "rows")] for line in lines]
    two_ranks(_answer, model, questions, tmp_path, timeout=120)
    alone = [_generated(load_model(model), model, question) for question in questions]
    assert [json.loads((tmp_path / f"answer-{rank}.json").read_text()) for rank in range(2)] == alone


def _answer(model: Path, questions: list, root: Path) -> None:
    """In each rank."""
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    os.environ["DS_ACCELERATOR"] = "cpu"
    rank = int(os.environ["RANK"])
    deepspeed.init_distributed("gloo")
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    held = HfDeepSpeedConfig(config)  # while it lives, models are loaded in shards
    engine = deepspeed.initialize(model=load_model(model), config=config)[0]
    answer = _generated(engine.module, model, questions[rank], synced_gpus=True)
    assert held is not None
    (root / f"answer-{rank}.json").write_text(json.dumps(answer))
    torch.distributed.barrier()


def _generated(model, path: Path, question: list, **options) -> list[int]:
    from mllm import load_processor
    from mllm.inference.prompt import encode_prompt, model_inputs

    processor = load_processor(path)
    inputs = model_inputs(processor, [encode_prompt(processor, question)], device=model.device)
    with torch.no_grad():
        found = model.eval().generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, **options)
    return found[0, inputs["input_ids"].shape[1] :].tolist()


def _with_files(row: dict, root: Path) -> dict:
    files = (str(root / item["path"]) for item in row["media"])
    content = [
        item if item["type"] == "text" else {**item, item["type"]: next(files)}
        for item in row["messages"][0]["content"]
    ]
    return {"role": "user", "content": content}


def _losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
