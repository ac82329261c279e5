"""Owns the way to the Hub: who is logged in, the repository, and one commit of exactly these files.

Does not know why these files. The Hub's client is huggingface_hub, 0.36 to 2: its errors come from
another package in each of them.
"""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from chatglm.publishing.contents import Contents

# The error of the package that makes the connections, which is no OSError in all of them.
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
WEIGHTS = (".bin", ".safetensors", ".bin.index.json", ".safetensors.index.json")


def send(contents: Contents, repo: str, is_private: bool, message: str) -> str:
    """Put a folder's files into a repository, made if it is not there; return the commit's address.

    Args:
        contents: the files.
        repo: OWNER/NAME, or NAME for one's own.
        is_private: whether nobody else may see it.
        message: of the commit.

    Raises:
        ValueError: if nobody is logged in, the Hub cannot be reached or refuses it, the repository
            is public and shall be private, or holds other weights already.
    """
    if get_token() is None:
        raise ValueError(
            "nobody is logged in to the Hugging Face Hub on this machine: run `hf auth login` "
            "once, or set HF_TOKEN to a token that may write"
        )
    api: Any = HfApi(library_name="chatglm")
    with _explaining(repo):
        name = str(api.create_repo(repo, private=is_private or None, exist_ok=True).repo_id)
        _check_visibility(api, name, is_private)
        _check_weights(api, name, contents)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=contents.folder,
            allow_patterns=contents.kept,
            commit_message=message,
        )
    return str(commit.commit_url)


@contextmanager
def _explaining(repo: str) -> Generator[None, None, None]:
    """Turn what the client raises into an error of the caller's."""
    try:
        yield
    except (TRANSPORT_ERROR, OSError) as error:
        reason = str(error).strip() or type(error).__name__
        raise ValueError(
            f"{repo} could not be written to on the Hub: {reason} (may the token write, and is the "
            "owner you or an organization of yours?)"
        ) from error


def _check_visibility(api: Any, repo: str, is_private: bool) -> None:
    """Refuse to put into the open what was to be private: an old repository stays as it was."""
    if is_private and not api.repo_info(repo).private:
        raise ValueError(
            f"{repo} is there already, and public: name another repository, make that one private "
            "in its settings, or leave --private out"
        )


def _check_weights(api: Any, repo: str, contents: Contents) -> None:
    """Refuse to leave weights of another model beside these, which would be read instead."""
    others = set(api.list_repo_files(repo)) - set(contents.kept)
    left = sorted(name for name in others if name.endswith(WEIGHTS) and _is_at_the_top(name))
    if left:
        raise ValueError(
            f"{repo} holds weights that this folder does not have, {', '.join(left)}, and they "
            "might be loaded instead: delete them there, or name another repository"
        )


def _is_at_the_top(name: str) -> bool:
    return len(PurePosixPath(name).parts) == 1
