"""Verifying a Hub folder: another process loads it without this package and uses it, then does so once more from what
that process saved."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .build import build_folder
from .errors import HubUploadError, redact

CHILD = Path(__file__).with_name("verify_child.py")
# Variables that could lead the process to this checkout, to a cache that already knows the code, or hold a secret.
_REMOVED = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT")


@dataclass(frozen=True)
class Check:
    """One thing that worked: its name, what was seen, and whether it was the folder saved again."""

    name: str
    detail: str
    again: bool = False


def verify_folder(folder: str | Path, *, on_check: Callable[[Check], None] | None = None) -> list[Check]:
    """Load a Hub folder in a fresh process, offline, with an empty module cache and without this package: config,
    model, tokenizer, a forward, a generation, a LoRA step (with peft), save and reload. Then the same from the folder
    which that process saved.

    Args:
        folder: as `build_folder` writes it. It is only read. Of one without code, as `save_pretrained` leaves it,
            a copy is tried to which this package's was added, as `push` does.
        on_check: called with each check as it passes.

    Raises:
        HubUploadError: the folder is not there, holds no complete model, or the first check that failed, with the
            process's last words.
    """
    folder = Path(folder).resolve()
    if not (folder / "config.json").is_file():
        raise HubUploadError(f"{folder} is not a model folder: it has no config.json.")
    checks: list[Check] = []
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        if not _has_code(folder):
            folder = build_folder(folder, Path(scratch) / "with-code").output
            checks.append(Check("code", "the folder has none; this package's was added to a copy"))
            if on_check is not None:
                on_check(checks[0])
        saved = Path(scratch) / "saved-again"
        for stage, source in (("first", folder), ("again", saved)):
            for check in _run_child(source, saved, stage, Path(scratch) / stage):
                checks.append(check)
                if on_check is not None:
                    on_check(check)
    return checks


def _has_code(folder: Path) -> bool:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise HubUploadError(f"{folder / 'config.json'} is not a JSON file: {error}") from error
    # A model that was loaded from a folder with code keeps the map where it is saved again, by this package's class
    # without the files.
    return "auto_map" in values and any(folder.glob("*.py"))


def _run_child(source: Path, target: Path, stage: str, home: Path):
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in _REMOVED}
    environment |= {
        "HF_HOME": str(home),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # -I: neither the current directory nor the user's site packages nor PYTHON* variables are looked at.
    command = [sys.executable, "-I", str(CHILD), str(source), str(target), stage]
    errors = home / "stderr"
    with errors.open("w+", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=home,
            # A question about remote code would wait for an answer that never comes.
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
        )
        failure = None
        try:
            for line in process.stdout:
                entry = json.loads(line)
                if "error" in entry:
                    failure = entry["error"]
                else:
                    yield Check(entry["check"], entry["detail"], stage == "again")
            status = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if status != 0:
        words = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]
        where = "the folder saved again by a stranger's process" if stage == "again" else f"the folder {source}"
        reason = failure or f"the process ended with status {status}"
        raise HubUploadError(redact(f"{where} did not verify: {reason}\n" + "\n".join(f"  {line}" for line in words)))
