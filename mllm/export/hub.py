"""Upload an export to the Hugging Face Hub, after looking once more at what was verified."""

from pathlib import Path

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from mllm.checkpoints import COMPLETE, is_complete
from mllm.errors import CheckpointError, ExportError
from mllm.export.report import describe_files, read_report


def push(path: str | Path, repo_id: str, *, private: bool, token: str | None = None) -> str:
    """Upload a verified export and return its address.

    Files are hashed again first: what was changed since the verification is not uploaded.

    Args:
        path: A directory written by `export`.
        repo_id: ORG/NAME; made where it does not exist.
        private: Whether a repository that is made is private.
        token: The Hub token; that of the login by default.

    Raises:
        CheckpointError: `path` is no finished export, or was changed after it was verified.
        ExportError: The Hub refused.
    """
    check_is_verified(path)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=path, commit_message="Upload a verified export")
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError) as error:
        raise ExportError(
            f"the Hub did not take {path} as {repo_id}: {str(error).strip().splitlines()[0]}",
            expected="an ORG/NAME that your token may write to, and a connection",
            do="log in with `hf auth login`, check the name, and push again; the export itself is kept",
        ) from error
    return f"{api.endpoint}/{repo_id}"


def check_is_verified(path: str | Path) -> None:
    """Check that `path` is an export whose every file is as it was when it was verified.

    Raises:
        CheckpointError: It is not.
    """
    if not is_complete(path, kind="export"):
        raise CheckpointError(
            f"{path} has no {COMPLETE} of an export",
            expected="a directory written by `mllm.export.export`, which finishes only what it could verify",
            do="export the model with scripts/export.py and push that directory",
        )
    now, then = describe_files(Path(path)), read_report(path).files
    if changed := sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name)):
        raise CheckpointError(
            f"{path} was changed after it was verified: {', '.join(changed[:5])}",
            expected="the files that were compared with the model",
            do="export the model again",
        )
