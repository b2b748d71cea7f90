"""Writing a folder in one step: it appears complete or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import HubUploadError


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
        yield stage
        check_output(output, overwrite, keep=keep)
        _move_into_place(stage, output)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _move_into_place(stage: Path, output: Path) -> None:
    if not output.exists():
        stage.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
    output.rename(old / output.name)
    try:
        stage.rename(output)
    except BaseException:
        (old / output.name).rename(output)
        raise
    finally:
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
