"""Pushing: only a complete export whose files are those that were verified, and never a word about the token."""

import pytest
from huggingface_hub.errors import HfHubHTTPError

from mllm.checkpoints import atomic_directory
from mllm.errors import CheckpointError, ExportError
from mllm.export import hub, push
from mllm.export.report import CARD, ExportReport, describe_files, write_report

SECRET = "hf_not-a-token"


class FakeApi:
    """Notes what the Hub is asked for; fails with `error` where one is set."""

    endpoint = "https://hub.example"
    error: Exception | None = None
    calls: list[tuple]

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, *, private, exist_ok):
        if self.error:
            raise self.error
        self.calls.append(("create", repo_id, private, exist_ok, self.token))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, folder_path))


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "calls", [], raising=False)
    return FakeApi.calls


@pytest.fixture
def verified(tmp_path):
    """A directory as `export` leaves one."""
    with atomic_directory(tmp_path / "out", kind="export") as partial:
        (partial / "model.safetensors").write_bytes(b"weights")
        (partial / CARD).write_text("card")
        facts = {"architecture": "X", "dtype": "float32", "trained_dtype": "float32", "num_parameters": 1}
        numbers = {"num_probes": 1, "max_abs_diff": 0.0, "tolerance": 0.0, "same_tokens": True}
        others = {"merge_max_abs_diff": None, "rounding_max_abs_diff": None, "versions": {}}
        write_report(partial, ExportReport(**facts, **numbers, **others, files=describe_files(partial)))
    return tmp_path / "out"


@pytest.mark.parametrize("private", [True, False])
def test_a_verified_export_is_pushed(verified, calls, private, capsys, caplog):
    assert push(verified, "org/name", private=private, token=SECRET) == "https://hub.example/org/name"
    assert calls == [("create", "org/name", private, True, SECRET), ("upload", "org/name", verified)]
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err + caplog.text


def test_the_card_may_be_edited(verified, calls):
    (verified / CARD).write_text("better words")
    push(verified, "org/name", private=True)
    assert len(calls) == 2


@pytest.mark.parametrize("change", ["changed", "added", "removed"])
def test_what_was_changed_since_is_not_pushed(verified, calls, change):
    weights = verified / "model.safetensors"
    if change == "changed":
        weights.write_bytes(b"others!")
    if change == "added":
        (verified / "extra.py").write_text("print()")
    if change == "removed":
        weights.unlink()
    with pytest.raises(CheckpointError, match="was changed after it was verified: (model.safetensors|extra.py)"):
        push(verified, "org/name", private=True)
    assert calls == []


def test_nothing_but_an_export_is_pushed(assembled, tmp_path, calls):
    for path in (assembled, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match=r"has no complete.json of an export"):
            push(path, "org/name", private=True)
    assert calls == []


@pytest.mark.parametrize("error", [HfHubHTTPError, OSError])
def test_what_the_hub_says_is_passed_on_without_the_token(verified, calls, monkeypatch, error):
    refusal = OSError("no way\nlong trace") if error is OSError else _refusal()
    monkeypatch.setattr(FakeApi, "error", refusal)
    with pytest.raises(ExportError, match="the Hub did not take .* as org/name: no way") as caught:
        push(verified, "org/name", private=True, token=SECRET)
    assert SECRET not in str(caught.value)
    assert "long trace" not in str(caught.value)
    assert calls == []


def _refusal() -> HfHubHTTPError:
    import httpx

    request = httpx.Request("POST", "https://hub.example", headers={"authorization": f"Bearer {SECRET}"})
    return HfHubHTTPError("no way", response=httpx.Response(403, request=request))
