"""An exported folder as a repository of the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from common.config.errors import ConfigError


def check_repository(option: str, repository: str) -> None:
    """Refuse what is no name of a repository, given as that option.

    Raises:
        ConfigError: says so.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"{option}: {repository!r} is no repository; give ORGANISATION/NAME") from error


def push_folder(folder: Path, repository: str, private: bool) -> str:
    """Make the repository where there is none, and upload the folder in one commit; returns its address.

    Raises:
        ConfigError: the hub cannot be reached, or refuses; the folder is written all the same.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Exported by opdlm")
    except Exception as error:  # its client has errors of its HTTP library, whichever that is
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--push: {repository!r} could not be written ({reason}); {str(folder)!r} is complete: once the hub can be "
            f"reached and `hf auth login` is done, upload it with hf upload {repository} {folder}"
        ) from error
    return str(address)
