"""Pushing a model to the Hub in one commit."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_token, validate_repo_id

from .build import BuiltFolder, build_folder, read_config
from .errors import HubUploadError, redact
from .model_card import CardOptions
from .verify import Check, verify_folder

# Files of a repo that an overwriting push removes where the new folder lacks them: loading would mix them with the new
# ones. Anything else in a repo is left alone.
_STALE_PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "*_seqboat.py",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.jinja",
    "activation_rates.png",
)
# What the Hub puts into a new repo itself.
_INITIAL_FILES = {".gitattributes", "README.md"}


@dataclass(frozen=True)
class Pushed:
    """Where the model went: address for a browser, commit hash, and the pull request's address if one was opened."""

    url: str
    commit: str
    pull_request: str | None = None


@dataclass(frozen=True)
class _Remote:
    exists: bool
    head: str | None = None
    files: frozenset[str] = frozenset()
    new_branch: bool = False


def push_folder(
    model: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    dtype: str | None = None,
    card: CardOptions | None = None,
    verify: bool = True,
    on_build: Callable[[BuiltFolder], None] | None = None,
    on_check: Callable[[Check], None] | None = None,
) -> Pushed:
    """Build, verify and upload a model.

    The upload ends in one commit: until then the repo's content is what it was. What a broken push has already sent is
    not sent again by the next one. The steps before the commit that show are the creation of a new, empty repo, and
    of a new branch.

    Args:
        model: a folder that `save_pretrained`, a Trainer or the converter wrote.
        repo_id: `name/repo`; created when it does not exist.
        private: create the repo as a private one.
        revision: branch, `main` by default; created from `main` when it does not exist.
        create_pr: open a pull request against the revision instead of changing it.
        message: the commit's title.
        token: access token; by default the one of `hf auth login` or HF_TOKEN.
        overwrite: replace the model in a repo that is not empty, outdated weights and code files included.
        max_shard_size: largest safetensors file.
        card: what the model card says beyond config and trainer state.
        verify: load the folder in a fresh process first.
        on_build, on_check: called with the built folder and with each check as it passes.

    Raises:
        HubUploadError: nothing was committed; the message says why and holds no token.
    """
    api = HfApi(token=token)
    tokens = (token, get_token())
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubUploadError(f"repo id {repo_id!r} is not valid: {error}") from None
    if repo_id.count("/") != 1:
        raise HubUploadError(f"repo id {repo_id!r} names no owner; expected NAME/REPO, for instance alice/seqboat.")
    if message is not None and not message.strip():
        raise HubUploadError("the commit message is empty.")
    card = card or CardOptions()
    card.repo_id = card.repo_id or repo_id
    read_config(Path(model))
    remote = _guarded(lambda: _inspect(api, repo_id, revision), repo_id, tokens)
    _check_remote(api, remote, repo_id, revision, private, create_pr, overwrite, tokens)
    scratch = Path(tempfile.mkdtemp(prefix="push-"))
    try:
        built = build_folder(model, scratch / "folder", max_shard_size=max_shard_size, dtype=dtype, card=card)
        if on_build is not None:
            on_build(built)
        if verify:
            verify_folder(built.output, on_check=on_check)
        message = message or f"Upload {built.model_class}"
        return _guarded(
            lambda: _upload(api, built.output, repo_id, remote, private, revision, create_pr, message), repo_id, tokens
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _inspect(api: HfApi, repo_id: str, revision: str | None) -> _Remote:
    # A bad token is found before minutes go into building and verifying.
    api.whoami()
    try:
        info = api.repo_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        info = api.repo_info(repo_id)
        return _Remote(True, info.sha, frozenset(file.rfilename for file in info.siblings or ()), new_branch=True)
    except RepositoryNotFoundError:
        return _Remote(False)
    return _Remote(True, info.sha, frozenset(file.rfilename for file in info.siblings or ()))


def _check_remote(
    api: HfApi,
    remote: _Remote,
    repo_id: str,
    revision: str | None,
    private: bool,
    create_pr: bool,
    overwrite: bool,
    tokens: tuple[str | None, ...],
) -> None:
    if not remote.exists:
        if create_pr:
            raise HubUploadError(
                f"the repo {repo_id} does not exist, so there is nothing to open a pull request against."
            )
        return
    if create_pr and remote.new_branch:
        raise HubUploadError(f"the repo {repo_id} has no revision {revision!r} to open a pull request against.")
    if private and not _guarded(lambda: api.repo_info(repo_id), repo_id, tokens).private:
        raise HubUploadError(f"the repo {repo_id} exists and is public; --private is for a repo that is created.")
    filled = remote.files - _INITIAL_FILES
    if filled and not (overwrite or create_pr or remote.new_branch):
        where = f"the repo {repo_id}" + (f" at {revision}" if revision else "")
        raise HubUploadError(
            f"{where} is not empty ({', '.join(sorted(filled)[:3])}, ...); pass --overwrite to replace the model in "
            "it, --revision for another branch, or --create-pr to propose the change."
        )


def _upload(
    api: HfApi,
    folder: Path,
    repo_id: str,
    remote: _Remote,
    private: bool,
    revision: str | None,
    create_pr: bool,
    message: str,
) -> Pushed:
    head = remote.head
    if not remote.exists:
        api.create_repo(repo_id, private=private or None)
        head = api.repo_info(repo_id).sha
    files = sorted(file for file in folder.iterdir() if file.is_file())
    additions = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in files]
    new = {file.name for file in files}
    stale = [name for name in sorted(remote.files - new) if any(fnmatch(name, pattern) for pattern in _STALE_PATTERNS)]
    new_branch = revision is not None and revision != "main" and (remote.new_branch or not remote.exists)
    # Large files first, against a revision that exists: the branch appears only when nothing but the commit is left.
    api.preupload_lfs_files(
        repo_id, additions, revision=None if new_branch else revision, create_pr=create_pr, free_memory=False
    )
    if new_branch:
        api.create_branch(repo_id, branch=revision)
    try:
        commit = api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(name) for name in stale)],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            # The Hub refuses the commit if somebody else's came since the repo was looked at.
            parent_commit=head,
        )
    except BaseException:
        if new_branch:
            api.delete_branch(repo_id, branch=revision)
        raise
    url = f"{api.endpoint}/{repo_id}"
    if commit.pr_url is not None:
        return Pushed(commit.pr_url, commit.oid, commit.pr_url)
    return Pushed(url if revision in (None, "main") else f"{url}/tree/{revision}", commit.oid)


def _guarded(step: Callable, repo_id: str, tokens: tuple[str | None, ...]):
    """Run a step that speaks to the Hub; its errors become one readable message without a token."""
    try:
        return step()
    except HubUploadError:
        raise
    except LocalTokenNotFoundError:
        raise HubUploadError("no access token: run `hf auth login`, set HF_TOKEN, or pass --token.") from None
    except BadRequestError as error:
        raise HubUploadError(redact(f"the Hub refused the push to {repo_id}: {error}", tokens)) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        reasons = {
            401: "the Hub does not accept the access token; make one with write permission at "
            "https://huggingface.co/settings/tokens",
            403: f"the access token may not write to {repo_id}",
            412: f"{repo_id} was changed by somebody else meanwhile; nothing was committed, look at it and push again",
        }
        reason = reasons.get(status, f"the Hub answered with an error for {repo_id}; nothing was committed")
        raise HubUploadError(redact(f"{reason}. ({error})", tokens)) from None
    # The client's HTTP library differs between its releases, and so do the errors of a broken connection.
    except Exception as error:
        cause = error.__cause__
        detail = f"{error}" + (f" {cause}" if cause is not None else "")
        raise HubUploadError(
            redact(
                f"the push to {repo_id} broke off: {detail} Nothing was committed; what was already uploaded is kept, "
                "run the same command again.",
                tokens,
            )
        ) from None
