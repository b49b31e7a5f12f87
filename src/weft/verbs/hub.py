"""The Hub: a finished output uploaded as a repository of the user's, after a check that this can be, before the work.

check_push("me/smaller")  ...  push("smaller/", "me/smaller")
"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from weft.errors import WeftError
from weft.progress import say

__all__ = ["check_push", "push"]


def check_push(name: str) -> None:
    """Raises WeftError where `name` is no name of a repository, or nobody is logged in."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise WeftError(f"--push-to-hub {name!r} is no name of a repository, such as me/my-model: {error}") from None
    try:
        huggingface_hub.HfApi().whoami()
    except Exception as error:  # no token, a wrong one, no connection: each has classes of its own
        reason = " ".join(str(error).split()).rstrip(".")
        raise WeftError(f"--push-to-hub needs a login to the Hub (hf auth login): {reason}.") from None


def push(directory: str | Path, name: str) -> str:
    """Upload all files of a directory to the repository, which is made where there is none; returns its address.

    Raises:
        WeftError: it failed; the directory stays as it is.
    """
    api = huggingface_hub.HfApi()
    try:
        made = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=directory, commit_message="Upload from weft")
    except Exception as error:  # as above
        reason = " ".join(str(error).split()).rstrip(".")
        raise WeftError(
            f"{directory} is complete, but could not be uploaded: {reason}. Once that is mended: hf upload {name} "
            f"{directory}."
        ) from error
    say(f"Uploaded to {made}.", always=True)
    return str(made)
