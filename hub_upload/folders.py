"""Writing a folder in one step: it appears complete or not at all."""

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import HubUploadError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(output: Path, overwrite: bool, *, keep: Path | None = None) -> None:
    """Refuse an output place that `staged_folder` must not write to.

    Args:
        output: the folder to be written.
        overwrite: an existing model folder may be replaced.
        keep: a path that is read and so must not lie in the output, nor hold it.

    Raises:
        HubUploadError: `output` is a file, is not empty (without `overwrite`), does not hold a model although it is
            not empty (an unrelated folder is never deleted), or overlaps with `keep`.
    """
    place = output.resolve()
    if keep is not None:
        source = keep.resolve()
        if place == source or place in source.parents or source in place.parents:
            raise HubUploadError(
                f"the output folder {output} overlaps with {keep}, which is read; choose another one."
            )
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise HubUploadError(f"the output {output} exists and is not a folder; choose another one.")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise HubUploadError(f"the output folder {output} is not empty; choose another one or pass --overwrite.")
        if not (output / "config.json").is_file():
            raise HubUploadError(
                f"the output folder {output} is not empty and holds no config.json, so it is no model folder; "
                "--overwrite replaces model folders only."
            )


@contextmanager
def staged_folder(output: Path, overwrite: bool = False, *, keep: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `output` that takes its place when the block ends, and vanishes when it fails.

    Raises HubUploadError as `check_output` does, before anything is written, or when the output appeared meanwhile.
    """
    output = Path(os.path.abspath(output))
    check_output(output, overwrite, keep=keep)
    output.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        # mkdtemp makes folders private; a model folder gets what the user's umask gives.
        umask = os.umask(0)
        os.umask(umask)
        stage.chmod(0o777 & ~umask)
        try:
            yield stage
        # safetensors and torch put the system's error into words of their own; none names the place.
        except (OSError, SafetensorError, RuntimeError) as error:
            if getattr(error, "errno", None) not in _FULL and "No space left" not in str(error):
                raise
            raise OSError(f"{output} cannot be written, and nothing of it is kept: {error}") from error
        check_output(output, overwrite, keep=keep)
        put_in_place(stage, output)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def put_in_place(stage: Path, target: Path) -> None:
    """Give the folder `stage` the name `target`; what stood there before is removed.

    A process that is killed in here leaves one of the two whole under that name. Where the system cannot exchange two
    names in one step, there is a moment at which the old folder is called `.NAME.old`; `restore` gives it back.
    """
    try:
        stage.rename(target)
        return
    except OSError as error:
        # A folder that is not empty stands there.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if _exchange(stage, target):
        shutil.rmtree(stage)
        return
    old = target.with_name(f".{target.name}.old")
    target.rename(old)
    try:
        stage.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)


def restore(target: Path) -> None:
    """Put right what a `put_in_place` that was killed has left."""
    old = target.with_name(f".{target.name}.old")
    if not old.exists():
        return
    if target.exists():
        shutil.rmtree(old)
    else:
        old.rename(target)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux's renameat2); False where that cannot be done."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(os.path.abspath(first)), here, os.fsencode(os.path.abspath(second)), exchange) == 0
