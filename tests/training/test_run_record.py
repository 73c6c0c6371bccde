import copy
import json

import pytest

from mllm.errors import CheckpointError
from mllm.training.arguments import build_arguments
from mllm.training.run_record import (
    RUN_RECORD,
    claim_directory,
    describe_git,
    hash_files,
    refuse_foreign_directory,
    resolved_options,
)

RECORD = {
    "model": {"path": "/a", "sha256": {"model.safetensors": "1"}},
    "data": [{"path": "/rows.jsonl", "rows": 3, "sha256": "2", "take": "all", "weight": None}],
    "options": {"learning_rate": 0.1, "seed": 1},
    "world_size": 1,
}


def test_a_directory_is_claimed_once_and_the_same_run_goes_on(tmp_path):
    out = tmp_path / "a" / "run"
    claim_directory(out, RECORD)
    assert json.loads((out / RUN_RECORD).read_text()) == RECORD
    (out / "checkpoint-1").mkdir()
    claim_directory(out, RECORD)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("options", "seed"), 2, "other options: seed = 1, now 2"),
        (("model", "sha256", "model.safetensors"), "9", "other model"),
        (("data", 0, "sha256"), "9", "other data"),
        (("data", 0, "rows"), 9, "other data"),
        (("data", 0, "take"), "end:3", "other data"),
        (("data", 0, "weight"), 2.0, "other data"),
        (("world_size",), 2, "other world_size"),
        (("sharding",), "deepspeed zero 2", "other sharding"),
    ],
)
def test_another_run_is_refused_and_nothing_changes(tmp_path, path, value, message):
    claim_directory(tmp_path / "run", RECORD)
    other = copy.deepcopy(RECORD)
    entry = other
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    with pytest.raises(CheckpointError, match=message):
        claim_directory(tmp_path / "run", other)
    assert json.loads((tmp_path / "run" / RUN_RECORD).read_text()) == RECORD


def test_files_count_by_content_so_that_a_run_may_be_moved(tmp_path):
    claim_directory(tmp_path / "run", RECORD)
    moved = copy.deepcopy(RECORD)
    moved["model"]["path"], moved["data"][0]["path"] = "/b", "/c/rows.jsonl"
    claim_directory(tmp_path / "run", moved)
    assert json.loads((tmp_path / "run" / RUN_RECORD).read_text()) == RECORD  # the record stays the first one


def test_somebody_elses_directory_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    for refuse in (refuse_foreign_directory, lambda path: claim_directory(path, RECORD)):
        with pytest.raises(CheckpointError, match="holds files, but no run, such as thesis.tex"):
            refuse(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_stands_before_the_record_is_ours(tmp_path):
    for name in ("assembled", "assembled.partial-12", "base"):
        (tmp_path / name).mkdir()
    (tmp_path / "stage.yaml").write_text("")
    claim_directory(tmp_path, RECORD)
    assert json.loads((tmp_path / RUN_RECORD).read_text()) == RECORD


def test_where_and_how_often_is_written_does_not_make_another_run():
    base = {"model": "m", "data": ["a.jsonl"], "output_dir": "o", "use_cpu": True}
    changes = {
        "output_dir": "p",
        "save_steps": 3,
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_num_workers": 2,
        "on_bad": "quarantine",  # decides whether a run stops, not what it is
    }
    one, other = (resolved_options(build_arguments(base | more, where="")) for more in ({}, changes))
    assert one == other
    for change in ({"learning_rate": 0.1}, {"data": {"sources": ["a.jsonl"], "temperature": 2}}):
        assert one != resolved_options(build_arguments(base | change, where=""))
    assert json.loads(json.dumps(one)) == one and "parts" in one


def test_hashes_and_git(tmp_path):
    for name in ("config.json", "model.safetensors", "run.json", "complete.json", "notes.txt"):
        (tmp_path / name).write_text(name)
    assert list(hash_files(tmp_path)) == ["config.json", "model.safetensors"]
    git = describe_git()
    assert git is None or (len(git["commit"]) == 40 and isinstance(git["dirty"], bool))
