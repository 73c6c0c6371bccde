"""Every configuration of `train/rdpo.py` that is shipped parses, and trains two steps on a tiny LLaVA.

Where a published form can be put beside it, the configuration's own `data` is read, in that form.
"""

import json
import math
import runpy
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from mllm.data.contrasts import Contrast
from mllm.load import load_model
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.training.arguments import parse_arguments
from mllm.training.preference_loss import LossOptions
from mllm.training.preference_options import PreferenceArguments

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "train" / "configs"
SHIPPED = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
DOCUMENTS = {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in SHIPPED.items()}
RUNS = [name for name, document in DOCUMENTS.items() if "stages" not in document]
STAGES = [
    (name, stage["name"])
    for name, document in DOCUMENTS.items()
    for stage in document.get("stages", ())
    if stage.get("program") == "rdpo"
]
COMPARED = {
    "dpo": (LossOptions(), Contrast(seed=42)),
    "mdpo": (LossOptions(visual_weight=1.0, anchor_weight=1.0), Contrast("crop", (0.01, 0.2), seed=42)),
    "re_align_llava15": (LossOptions(visual_weight=1.0), Contrast("retrieved", seed=42)),
}
"""What each compares: DPO; DPO, a crop and an anchor; DPO and a retrieved image."""
PICTURES = ("own", "other")
ANSWERS = ("There is a red 3.", "There are a blue 7 and a green 5.")


@pytest.mark.parametrize("name", RUNS)
def test_configuration_compares_what_it_is_named_for(name):
    # `bf16: true` needs a GPU, or to be told that there is none.
    arguments = parse_arguments(["--config", str(SHIPPED[name]), "--use_cpu", "true"], PreferenceArguments)
    assert (arguments.loss, arguments.sides) == COMPARED[name]


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_stage_of_a_plan_parses(name, stage):
    argv = ["--config", str(SHIPPED[name]), "--stage", stage, "--use_cpu", "true"]
    arguments = parse_arguments(argv, PreferenceArguments)
    assert arguments.parts and arguments.data


@pytest.mark.parametrize("name", RUNS)
def test_configuration_says_where_it_comes_from(name):
    """Its source, what differs from it, and a place in the table of configurations."""
    head = SHIPPED[name].read_text(encoding="utf-8").split("\nmodel:")[0].replace("\n#", "")
    assert "github.com/" in head and "Deviations" in head and "No released checkpoint" in head
    assert f"(../train/configs/{name}.yaml)" in (ROOT / "docs" / "preference.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RUNS)
def test_configuration_trains_on_a_tiny_llava(name, tmp_path, llava, rdpo):
    document = DOCUMENTS[name]
    changes = {"model": llava, "output_dir": tmp_path / "run", "data_root": published(tmp_path / "data", name)}
    changes |= {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "use_cpu": "true", "disable_tqdm": "true"}
    changes |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "dataloader_num_workers": 0}
    if name == "dpo":  # as it is, it would be fetched
        changes["data"] = "[{path: rlaif_v.parquet, format: rlaif_v}]"
    argv = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    rdpo(parse_arguments(["--config", str(SHIPPED[name]), *argv], PreferenceArguments))

    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "loss" in line)
    terms = sum(1 for weight in (1, COMPARED[name][0].visual_weight, COMPARED[name][0].anchor_weight) if weight)
    assert first["loss"] == pytest.approx(terms * math.log(2), abs=1e-6)
    assert ("accuracies/visual" in first) == (COMPARED[name][1].media != "none")

    final = tmp_path / "run" / "final"
    adapter = json.loads((final / "adapter_config.json").read_text())
    text = document["parts"]["text"]
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (text["rank"], text["alpha"], 0.0)
    assert bool(adapter["modules_to_save"]) == ("image.connector" in document["parts"])
    rows = json.loads((final / "run.json").read_text())["rows"]
    assert rows["used"] == 4 and not rows["dropped"], rows
    load_model(final)


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """A tiny LLaVA, as the Hub would have it."""
    return save_stock_checkpoint(tmp_path_factory.mktemp("llava"), "llava")


@pytest.fixture(scope="module")
def rdpo():
    """Do what `train/rdpo.py` does with these arguments, in this process."""
    return runpy.run_path(str(ROOT / "train" / "rdpo.py"))["run"]


def published(directory: Path, name: str) -> Path:
    """Four pairs in the form, and under the names, that the configuration's data are published in."""
    records = {"dpo": rlaif_v, "mdpo": vlfeedback, "re_align_llava15": re_align}[name](directory)
    if name == "dpo":
        pq.write_table(pa.Table.from_pylist(records), directory / "rlaif_v.parquet")
    else:
        (source,) = DOCUMENTS[name]["data"]
        (directory / source["path"]).write_text(json.dumps(records), encoding="utf-8")
    return directory


def re_align(directory: Path) -> list[dict]:
    """Names of COCO 2014 without their folder; each side repeats the question."""
    own, other = save_pictures(directory / "train2014", "COCO_train2014_000000000{}.jpg")
    sides = [
        [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": answer}]
        for answer in ANSWERS
    ]
    pair = dict(zip(("chosen", "rejected"), sides, strict=True))
    return [{"image": own, "retrieved_image": other, **pair} for _ in range(4)]


def vlfeedback(directory: Path) -> list[dict]:
    """mDPO's selection: prompts written in Vicuna's template."""
    names = save_pictures(directory / "images", "llava-reasoning-{}.jpg")
    prompt = "A chat. USER: <image>\nWhat is it? ASSISTANT:"
    pair = dict(zip(("chosen", "rejected"), ANSWERS, strict=True))
    return [{"img_path": f"images/{names[number % 2]}", "prompt": prompt, **pair} for number in range(4)]


def rlaif_v(directory: Path) -> list[dict]:
    """Pictures in the table."""
    directory.mkdir(parents=True)
    pair = dict(zip(("chosen", "rejected"), ANSWERS, strict=True))
    facts = {"question": "What is it?", "origin_dataset": "COCO", "origin_split": "{}"}
    return [{"image": {"bytes": picture(number), "path": ""}, "idx": number, **facts, **pair} for number in range(4)]


def save_pictures(directory: Path, name: str) -> list[str]:
    """Write two pictures that differ; return their names."""
    directory.mkdir(parents=True)
    for number, kind in enumerate(PICTURES):
        (directory / name.format(kind)).write_bytes(picture(number))
    return [name.format(kind) for kind in PICTURES]


def picture(number: int) -> bytes:
    """A JPEG of one colour."""
    file = BytesIO()
    Image.new("RGB", (24, 20), (60 * number, 200 - 50 * number, 90)).save(file, "JPEG")
    return file.getvalue()
