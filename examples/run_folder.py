"""The folder of a run: it belongs to one run, one process at a time writes to it, and a checkpoint in it says what it
holds.

A run's folder has a `run.json` with the run's id. Each `checkpoint-N` in it has a `manifest.json`: the run, the place
among its checkpoints, the state that is plain numbers, and size and SHA-256 of every file. A checkpoint is written
aside and renamed last; one whose files are not those of its manifest is not resumed from.
"""

import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safe_files import read_json_object, write_json

from hub_upload.folders import put_in_place, restore

RUN_FILE, LOCK_FILE, MANIFEST_FILE = "run.json", ".lock", "manifest.json"
FORMAT = "seqboat-checkpoint-1"
PARTIAL = ".partial-"
# What the example scripts write into a run's folder, besides checkpoints. Whatever else lies there is somebody else's.
OWNED = (
    "averaged", "best", "final", "merged", "tensorboard", "runs", "README.md", "adapter_config.json",
    "adapter_model.safetensors", "metrics.jsonl", "report.json", "result.json", "results.json",
    "training_record.json", "activations.png", "confusion_matrix.png",
)  # fmt: skip
# Processes that made batches for a run that was killed keep its lock until they notice.
LOCK_SECONDS = 6
_CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")
_PICKLES = (".bin", ".pkl", ".pt", ".pth")


class RunFolder:
    """A folder that this process writes to until `close`.

    Attributes:
        path: the folder.
        run: the run's id.
    """

    def __init__(self, path: Path, run: str | None = None, lock: FileLock | None = None):
        self.path, self.run, self._lock = path, run or secrets.token_hex(8), lock

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def checkpoints(self) -> list[Path]:
        """This run's checkpoints, in the order in which they were written."""
        return [path for path, manifest in _manifests(self.path) if manifest["run"] == self.run]

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """A folder to write to, which is called `name` once the block has ended well."""
        stage = self.path / f"{PARTIAL}{name}"
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        try:
            yield stage
            put_in_place(stage, self.path / name)
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def seal(self, stage: Path, step: int, processes: int, state: dict[str, Any], rows: int | None = None) -> None:
        """Writes the manifest of a checkpoint that is whole but for it, and gives the folder its name.

        Args:
            rows: that all processes together read in a step, where that is enough to say which ones.
        """
        order = 1 + max((manifest["order"] for _, manifest in _manifests(self.path)), default=0)
        values = {"run": self.run, "order": order, "step": step, "processes": processes, "state": state}
        write_manifest(stage, {**values, **({} if rows is None else {"rows": rows})})
        put_in_place(stage, self.path / f"checkpoint-{step}")

    def keep_newest(self, limit: int | None, best: Path | None = None) -> None:
        """Removes this run's checkpoints but the `limit` that were written last and `best`; None keeps all."""
        for old in [] if limit is None else self.checkpoints()[:-limit]:
            if best is None or old.name != best.name:
                # Renamed first: one that is half removed never looks like a checkpoint.
                gone = self.path / f"{PARTIAL}removed-{old.name}"
                shutil.rmtree(gone, ignore_errors=True)
                shutil.rmtree(old.rename(gone), ignore_errors=True)


def take_folder(output_dir: str, checkpoint: Path | None = None, overwrite: bool = False) -> RunFolder:
    """Makes a folder this run's own, for this process until `close`.

    Args:
        output_dir: new, empty, or the folder of the run that goes on.
        checkpoint: what the run goes on from, as `find_checkpoint` gives it; it may lie elsewhere.
        overwrite: an earlier run's files are moved to a folder `replaced-N` in it.

    Raises ValueError where another process writes to the folder, or where it holds something else.
    """
    path = Path(output_dir)
    check_free(path, checkpoint is not None, overwrite)
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(path / LOCK_FILE), timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"output_dir {output_dir!r} is in use: another run is writing to it") from None
    try:
        return RunFolder(path, _claim(path, checkpoint, overwrite), lock)
    except BaseException:
        lock.release()
        raise


def take_folder_once(output_dir: str, checkpoint: Path | None = None, overwrite: bool = False) -> RunFolder:
    """`take_folder` by the main one of connected processes; what it refuses is raised in all."""
    # Here, since scripts that train nothing run without Accelerate.
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    folder, message = None, None
    if PartialState().is_main_process:
        try:
            folder = take_folder(output_dir, checkpoint, overwrite)
        except (ValueError, OSError) as error:
            message = str(error)
    run, message = broadcast_object_list([folder and folder.run, message])
    if message is not None:
        raise ValueError(message)
    return folder or RunFolder(Path(output_dir), run)


def check_free(path: Path, resuming: bool, overwrite: bool) -> None:
    """Raises ValueError where something else lies in an output folder already."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir {str(path)!r} is a file")
    if _entries(path) and not (resuming or overwrite):
        raise ValueError(
            f"output_dir {str(path)!r} is not empty: name another one, or give --resume_from_checkpoint to go on "
            "there, or --overwrite_output_dir True"
        )


def _entries(path: Path) -> list[Path]:
    """What lies in a folder, without the traces of a run that ended before it wrote anything."""
    if not path.is_dir():
        return []
    traces = (LOCK_FILE, RUN_FILE)
    return [entry for entry in path.iterdir() if entry.name not in traces and not entry.name.startswith(PARTIAL)]


def _claim(path: Path, checkpoint: Path | None, overwrite: bool) -> str:
    """The id of the run that the folder is for from now on."""
    for name in {entry.name.removeprefix(".").removesuffix(".old") for entry in path.glob(".*.old")}:
        restore(path / name)
    for partial in path.glob(f"{PARTIAL}*"):
        shutil.rmtree(partial)
    # Again, now that nobody else writes.
    check_free(path, checkpoint is not None, overwrite)
    manifest = None if checkpoint is None else read_manifest(checkpoint)
    inside = checkpoint is not None and checkpoint.resolve().parent == path.resolve()
    if overwrite and inside:
        raise ValueError(
            f"overwrite_output_dir would move {str(checkpoint)!r} away, which resume_from_checkpoint goes on from: "
            "give one of the two"
        )
    if overwrite:
        _set_aside(path)
    known = run_of(path) if _entries(path) else None
    if manifest is not None and (inside or known is not None):
        if known not in (None, manifest["run"]):
            raise ValueError(
                f"output_dir {str(path)!r} holds another run: {known}; the checkpoint {str(checkpoint)!r} is of run "
                f"{manifest['run']}. Name another output_dir"
            )
        # A checkpoint of the same step would take the place of one that is not this run's.
        own = {entry for entry, its in _manifests(path) if its["run"] == manifest["run"]}
        _move_aside(
            path, [entry for entry in _entries(path) if _CHECKPOINT.fullmatch(entry.name) and entry not in own]
        )
        if known is None:
            write_json(path / RUN_FILE, {"run": manifest["run"]})
        return manifest["run"]
    if manifest is not None and _entries(path) and not overwrite:
        raise ValueError(
            f"output_dir {str(path)!r} is not empty, and the checkpoint {str(checkpoint)!r} lies elsewhere: name "
            "another one"
        )
    run = secrets.token_hex(8)
    origin = {} if manifest is None else {"resumed_from": {"run": manifest["run"], "step": manifest["step"]}}
    write_json(path / RUN_FILE, {"run": run, **origin})
    return run


def _set_aside(path: Path) -> None:
    """Moves what runs have left in a folder; the run's id goes last, so that this can be cut off and done again."""
    left = [entry for entry in _entries(path) if entry.name in OWNED or _CHECKPOINT.fullmatch(entry.name)]
    _move_aside(path, left + ([path / RUN_FILE] if (path / RUN_FILE).exists() else []))


def _move_aside(path: Path, entries: list[Path]) -> None:
    if not entries:
        return
    number = next(number for number in itertools.count(1) if not (path / f"replaced-{number}").exists())
    aside = path / f"replaced-{number}"
    aside.mkdir()
    for entry in entries:
        entry.rename(aside / entry.name)
    print(f"moved to {aside}: {', '.join(entry.name for entry in entries)}")


def run_of(folder: Path) -> str | None:
    """The id in a folder's `run.json`, None where there is none."""
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    run = read_json_object(path).get("run")
    if not isinstance(run, str) or not run:
        raise ValueError(f"{str(path)!r} holds no id of a run: run={run!r}")
    return run


def _manifests(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Checkpoints with a manifest, in the order of writing. One whose manifest cannot be read is left out, and so left
    alone."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if _CHECKPOINT.fullmatch(path.name) and path.is_dir():
            try:
                found.append((path, read_manifest(path)))
            except (ValueError, OSError):
                continue
    return sorted(found, key=lambda entry: entry[1]["order"])


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a folder's run wrote last, None where there is no checkpoint.

    Raises ValueError where one has no manifest or a damaged one: it may be the one that was meant.
    """
    found = [path for path in (folder.iterdir() if folder.is_dir() else ()) if _CHECKPOINT.fullmatch(path.name)]
    manifests = {path: read_manifest(path) for path in found if path.is_dir()}
    run = run_of(folder)
    if run is None and len({manifest["run"] for manifest in manifests.values()}) > 1:
        raise ValueError(f"{str(folder)!r} holds checkpoints of several runs and no {RUN_FILE}: name a checkpoint")
    own = [path for path, manifest in manifests.items() if run in (None, manifest["run"])]
    if manifests and not own:
        raise ValueError(f"none of the checkpoints in {str(folder)!r} is of its run {run}: name one")
    return max(own, key=lambda path: manifests[path]["order"], default=None)


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    """Writes `manifest.json` over all files of a folder; `values` are run, order, step, processes and state."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _hash(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
    content = {"format": FORMAT, **values, "files": files}
    write_json(folder / MANIFEST_FILE, {**content, "sha256": _hash_of(content)})


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hash_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest; the files are not looked at. Raises ValueError where there is none or a damaged one."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ValueError(
            f"{str(folder)!r} has no {MANIFEST_FILE}: it is no whole checkpoint of this version, and is not resumed "
            "from"
        )
    manifest = read_json_object(path)
    checked = manifest.pop("sha256", None)
    try:
        whole = manifest["format"] == FORMAT and checked == _hash_of(manifest)
    except (KeyError, RecursionError):
        whole = False
    numbers = ("order", "step", "processes")
    if not (
        whole
        and isinstance(manifest.get("run"), str)
        and all(type(manifest.get(name)) is int and manifest[name] >= 0 for name in numbers)
        and isinstance(manifest.get("state"), dict)
        and isinstance(manifest.get("files"), dict)
        and all(
            isinstance(file, dict) and type(file.get("bytes")) is int and isinstance(file.get("sha256"), str)
            for file in manifest["files"].values()
        )
    ):
        raise ValueError(f"{str(path)!r} is damaged or of another version: the checkpoint is not resumed from")
    return manifest


def verify_checkpoint(folder: Path, processes: int | None = None, rows: int | None = None) -> dict[str, Any]:
    """Compares every file of a checkpoint with its manifest, which is returned.

    Args:
        processes: of the run that goes on; another number has other random states and another order of rows.
        rows: that these read in a step, where as many as before make any number of processes read the same ones.

    Raises ValueError that names the file at fault.
    """
    manifest = read_manifest(folder)
    known = set()
    for name, expected in manifest["files"].items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{str(folder / MANIFEST_FILE)!r} names a file outside the checkpoint: {name!r}")
        if not path.is_file():
            raise ValueError(f"checkpoint {str(folder)!r} lacks the file {name!r} of its manifest")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{str(path)!r} is damaged: it has {size} bytes, its manifest says {expected['bytes']}")
        if _hash(path) != expected["sha256"]:
            raise ValueError(f"{str(path)!r} is damaged: its SHA-256 is not the one of the manifest")
        known.add(path)
    for path in folder.rglob("*"):
        if path.suffix in _PICKLES and path not in known:
            raise ValueError(f"{str(path)!r} is not in the checkpoint's manifest: it does not belong there")
    if rows is not None and "rows" in manifest:
        if manifest["rows"] != rows:
            raise ValueError(
                f"checkpoint {str(folder)!r} was written by a run of {manifest['rows']} rows a step, this run has "
                f"{rows}: it would read some rows twice and others never; batch_size, gradient_accumulation_steps and "
                f"the number of processes must make {manifest['rows']} rows"
            )
    elif processes is not None and manifest["processes"] != processes:
        raise ValueError(
            f"checkpoint {str(folder)!r} was written by {manifest['processes']} processes, this run has {processes}: "
            "it would draw other random numbers and read other rows"
        )
    return manifest


@contextmanager
def no_unpickling() -> Iterator[None]:
    """While it lasts, every `torch.load` reads tensors and plain values and runs no code, whatever its caller asked
    for."""
    names = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": None}
    before = {name: os.environ.get(name) for name in names}
    try:
        _set_variables(names)
        yield
    finally:
        _set_variables(before)


@contextmanager
def weights_only(folder: Path) -> Iterator[None]:
    """`no_unpickling` for the files of a checkpoint; raises ValueError that names it where they hold something
    else."""
    try:
        with no_unpickling():
            yield
    # Damaged and hostile files fail in their readers' own ways.
    except Exception as error:
        raise ValueError(f"checkpoint {str(folder)!r} cannot be resumed from: {error}") from error


def _set_variables(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def open_log(path: Path):
    """A log of JSON lines, to be appended to. What a killed process has left of a line is cut off."""
    stream = path.open("ab+")
    stream.seek(0)
    whole = stream.read().rfind(b"\n") + 1
    stream.truncate(whole)
    return stream
