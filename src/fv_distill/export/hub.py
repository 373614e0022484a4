"""Uploading exports and checkpoints to the Hugging Face Hub. Free of torch: `fv-distill push` starts at once.

The token is the one of `hf auth login` or of the environment, and only huggingface_hub touches it. Folders go up with
its `upload_folder`: in one commit (several beyond some 250 files), so that the Hub shows the old export until the new
one is there. What the Hub has is recognised by its hash and not sent again, which is how an interrupted push resumes.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from fv_distill.console import console

from .model_card import read_evaluation, refresh_model_card
from .run_record import EVALUATION_FILES
from .student_info import read_info

Result = TypeVar("Result")

# Where the newest checkpoint of a run goes; transformers' Trainer uses the same name.
LAST_CHECKPOINT = "last-checkpoint"

# Seconds before the second, third and fourth attempt; huggingface_hub repeats single requests for half a minute.
RETRY_WAITS = (1.0, 4.0, 15.0)
# Time-out, too many requests, and what gateways answer while the Hub is being restarted.
_TEMPORARY_STATUS = (408, 429, 500, 502, 503, 504)
# RuntimeError is what the storage client hf_xet and the LFS threads raise.
_ERRORS = (httpx2.HTTPError, OSError, RuntimeError)


class HubError(ValueError):
    """The Hub could not be used; the message says what to do.

    Attributes:
        is_temporary: whether the same call may succeed later without anybody doing something.
    """

    def __init__(self, message: str, *, is_temporary: bool) -> None:
        super().__init__(message)
        self.is_temporary = is_temporary


def push_directory(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    evaluation: str | Path | None = None,
    commit_message: str = "Upload with fv_distill",
) -> str:
    """Create the model repository if need be, upload a directory, and return the repository's address.

    The card of an export is brought up to date first: its snippet loads `repo_id`, its table is the latest evaluation.
    In the repository, files that an earlier push left in the directory's own folders are removed; others stay.

    Args:
        directory: an export, any other diffusers directory, or one with LoRA weights.
        repo_id: owner/name.
        private: make a new repository private.
        evaluation: a JSON file with `rows`, which becomes the export's `evaluation.json`.
        commit_message: of the commit.

    Raises:
        FileNotFoundError: if there is nothing in the directory that could be loaded.
        HubError: if the Hub refuses or can't be reached.
        ValueError: if the evaluation can't be read.
    """
    directory = Path(directory)
    check_pushable(directory)
    if evaluation is not None:
        read_evaluation(Path(evaluation))
        if Path(evaluation).resolve() != (directory / EVALUATION_FILES[0]).resolve():
            shutil.copyfile(evaluation, directory / EVALUATION_FILES[0])
    info = read_info(directory)
    if info is not None and (directory / "README.md").is_file():
        refresh_model_card(directory, info, name=repo_id)
    folders = sorted(path.name for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    url = open_repository(repo_id, private=private)
    _attempt(
        lambda: HfApi().upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            commit_message=commit_message,
            delete_patterns=[f"{folder}/*" for folder in folders],
        ),
        repo_id,
    )
    return url


def push_checkpoint(checkpoint: Path, repo_id: str) -> None:
    """Make `last-checkpoint` of an existing repository a copy of a checkpoint's folder.

    Raises:
        HubError: if the Hub refuses or can't be reached, saying how to upload it later.
    """
    try:
        _attempt(
            lambda: HfApi().upload_folder(
                repo_id=repo_id,
                folder_path=checkpoint,
                path_in_repo=LAST_CHECKPOINT,
                commit_message=f"Checkpoint {checkpoint.name}",
                delete_patterns="*",
            ),
            repo_id,
        )
    except HubError as error:
        later = f"hf upload {repo_id} <run>/checkpoints/{checkpoint.name} {LAST_CHECKPOINT}"
        raise HubError(
            f"{error}. The export was pushed, its checkpoint was not; `{later}` uploads it",
            is_temporary=error.is_temporary,
        ) from error


def open_repository(repo_id: str, *, private: bool = False) -> str:
    """Make sure that a model repository is there and may be written, and return its address.

    Raises:
        HubError: if it is not, or it is public and `private` is asked for.
    """
    if repo_id.count("/") != 1:
        raise HubError(f"{repo_id!r} is no repository; it has to be owner/name", is_temporary=False)
    if constants.is_offline_mode():
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it", is_temporary=True)
    if get_token() is None:
        raise HubError(
            f"not logged in to the Hub, so {repo_id} can't be written; run `hf auth login` with a token that has write "
            "permission, or set HF_TOKEN",
            is_temporary=False,
        )

    def open_once() -> str:
        api = HfApi()
        url = api.create_repo(repo_id, private=private or None, exist_ok=True, repo_type="model")
        # An existing repository is returned to everybody who may read it.
        api.auth_check(repo_id, write=True)
        if private and not api.model_info(repo_id).private:
            raise HubError(
                f"{repo_id} exists and is public, but a private repository is asked for; make it private in its "
                "settings on the Hub, or choose another name",
                is_temporary=False,
            )
        return str(url)

    return _attempt(open_once, repo_id)


def check_pushable(directory: Path) -> None:
    """Raise a `FileNotFoundError` for a directory that nothing could load from the Hub."""
    if (directory / "metadata.json").is_file():
        raise FileNotFoundError(
            f"{directory} is a training checkpoint; `fv-distill export` makes what can be pushed of it"
        )
    loadable = any((directory / name).is_file() for name in ("model_index.json", "config.json"))
    if not loadable and not any(directory.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{directory} has no model_index.json, config.json or .safetensors file; give an export, another diffusers "
            "directory, or one with LoRA weights"
        )


def _attempt(call: Callable[[], Result], repo_id: str) -> Result:
    """Call, and again after each wait while the failure looks temporary."""
    for wait in (*RETRY_WAITS, None):
        try:
            return call()
        except HFValidationError as error:
            raise HubError(f"{repo_id!r} can't be a repository: {error}", is_temporary=False) from error
        except _ERRORS as error:
            if isinstance(error, OSError) and error.filename is not None:
                # Of this disk, and says which file.
                raise
            explained = _explained(error, repo_id)
            if wait is None or not explained.is_temporary:
                raise explained from error
        console.print(f"{explained}. Trying again in {wait:g} s", highlight=False, markup=False, soft_wrap=True)
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _explained(error: Exception, repo_id: str) -> HubError:
    """What happened and what to do, without addresses: those of uploads are signed."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, httpx2.HTTPError):
        cause = cause.__cause__
    if not isinstance(cause, HfHubHTTPError):
        reason = cause or error
        message = (
            f"the Hub can't be reached ({type(reason).__name__}: {reason}); check the connection and push "
            "again, which sends only what is missing"
        )
        return HubError(message, is_temporary=True)
    status = cause.response.status_code
    said = f"{status}: {cause.server_message}" if cause.server_message else str(status)
    if status == 401:
        message = f"the Hub doesn't accept this login ({said}); run `hf auth login` or set HF_TOKEN to a valid token"
    elif status == 403:
        message = (
            f"this login may not write to {repo_id} ({said}); it needs write permission: make a token that has it at "
            f"{constants.ENDPOINT}/settings/tokens, run `hf auth login`, and check that {repo_id.partition('/')[0]} is "
            "you or an organisation of yours"
        )
    elif status in _TEMPORARY_STATUS:
        message = f"the Hub doesn't work at the moment ({said}); push again later, which sends only what is missing"
    else:
        message = f"the Hub refused {repo_id} ({said})"
    return HubError(message, is_temporary=status in _TEMPORARY_STATUS)
