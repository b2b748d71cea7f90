"""The classification example for its tests: its modules, small data in each task's format, and runs of a second."""

import dataclasses
import importlib
import io
import json
import lzma
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples/classification"
RECIPES = sorted((ROOT / "configuration/recipes/classification").glob("*.yaml"))
MODULES = [path.stem for path in EXAMPLE.glob("*.py")]
TINY = {
    "num_hidden_layers": 2, "hidden_size": 8, "v_head_dim": 8, "qk_head_dim": 4, "state_size": 2, "memory_size": 8,
    "classifier_hidden_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def importable():
    """The example's modules, which find each other in the script's folder; this process forgets them afterwards."""
    before = list(sys.path)
    sys.path.insert(0, str(EXAMPLE))
    yield
    sys.path[:] = before
    for name in [*MODULES, "recipes"]:
        sys.modules.pop(name, None)


def module(name):
    return importlib.import_module(name)


def write_reviews(folder):
    """The archive's layout; a positive review has other letters than a negative one."""
    rng = np.random.default_rng(0)
    path = folder / "reviews.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        for part, count in (("train", 14), ("test", 6)):
            for index in range(count):
                side = ("neg", "pos")[index % 2]
                text = bytes(rng.choice(list(b"abc" if side == "neg" else b"xyz"), size=rng.integers(20, 60)))
                entry = tarfile.TarInfo(f"aclImdb/{part}/{side}/{index}_7.txt")
                entry.size = len(text)
                tar.addfile(entry, io.BytesIO(text))
            tar.addfile(tarfile.TarInfo(f"aclImdb/{part}/unsup/0_0.txt"))
    return {"data_path": path, "max_length": 40}


def write_xz(path, save):
    buffer = io.BytesIO()
    save(buffer)
    path.write_bytes(lzma.compress(buffer.getvalue()))
    return path


def write_gray_pictures(folder):
    rng = np.random.default_rng(0)
    pixels = write_xz(folder / "pixels.npy.xz", lambda f: np.save(f, rng.integers(0, 256, (30, 64), dtype=np.uint8)))
    np.save(folder / "labels.npy", rng.integers(0, 10, 30, dtype=np.uint8))
    return {"data_path": pixels, "labels_path": folder / "labels.npy"}


def write_pairs(folder):
    rows = [{"question": "abc"[i % 3] * (10 + i), "answer": "xyz"[i % 3] * (12 + i)} for i in range(12)]
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return {"data_path": path, "max_length": 24}


def write_recordings(folder):
    rng = np.random.default_rng(0)
    arrays = {
        "audio": rng.integers(-(2**15), 2**15, (20, 200)).astype(np.int16),
        "label": (np.arange(20) % 4).astype(np.uint8),
        "is_test": (np.arange(20) >= 14).astype(np.uint8),
        "words": np.array(["yes", "no", "up", "down"]),
    }
    return {"data_path": write_xz(folder / "words.npz.xz", lambda f: np.savez(f, **arrays))}


def write_generated(folder):
    return {"data_path": folder / "generated", "train_size": 8, "test_size": 4}


WRITERS = {
    "lra-text": write_reviews,
    "lra-image": write_gray_pictures,
    "lra-listops": write_generated,
    "lra-pathfinder": write_generated,
    "lra-pathx": write_generated,
    "lra-retrieval": write_pairs,
    "speech-commands": write_recordings,
}


def draw_little(monkeypatch):
    """Short trees, few at a time, and small pictures for Path-X, so that generated data are there at once."""
    listops, pathfinder = module("listops"), module("pathfinder")
    monkeypatch.setattr(listops, "LENGTHS", (20, 80))
    monkeypatch.setattr(listops, "BLOCK", 50)
    monkeypatch.setattr(pathfinder, "BLOCK", 16)
    monkeypatch.setattr(pathfinder.os, "cpu_count", lambda: 1)
    small = dataclasses.replace(pathfinder.PATHX, size=64, contour_length=5, distractors=0)
    monkeypatch.setattr(pathfinder, "PATHX", small)
    # Ten dashes hardly find room in it.
    monkeypatch.setattr(module("tasks"), "SHORT_CONTOURS", (4, 5, 6))


def run(recipe, output, overrides=None, **settings):
    settings = {
        "output_dir": output, "config_overrides": json.dumps(TINY | (overrides or {})), "max_steps": 2,
        "eval_steps": 1,
        "batch_size": 4, "eval_batch_size": 4, "gradient_accumulation_steps": 1, "validation_size": 4,
        "warmup_steps": 1, "logging_steps": 1, "use_cpu": True, **settings,
    }  # fmt: skip
    argv = [part for name, value in settings.items() if value is not None for part in (f"--{name}", str(value))]
    recipe_file = ROOT / f"configuration/recipes/classification/{recipe}.yaml"
    return module("train").main([str(recipe_file), *argv])
