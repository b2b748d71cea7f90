"""Writes the results of `run_tasks.py --collect` into a page: a table, with the pictures and all numbers beside it.

    python examples/classification/report.py tasks.tar.gz [MORE.tar.gz] --page docs/classification.md

The table stands between two comment lines of the page; what is written around them stays. Of a task in several files
the last one counts.
"""

import sys
from pathlib import Path

# The examples share modules, which lie one folder up.
sys.path.append(str(Path(__file__).resolve().parent.parent))
from script_start import ArgumentParser  # before torch

# isort: split
import argparse
import lzma
import math
import tarfile
import zlib

from safe_files import decode_text, parse_json, replacing, write_json, write_text

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
PICTURES = ("confusion_matrix.png", "activations.png")
TITLES = {
    "text": "LRA text (IMDB bytes)", "image": "LRA image (CIFAR-10, grey)", "listops": "LRA ListOps",
    "pathfinder": "LRA Pathfinder 32", "pathx": "LRA Path-X", "retrieval": "retrieval",
    "speech": "raw speech (4 words)",
}  # fmt: skip


# A picture of a task has some 100 kB, a summary less; an archive may say it holds anything.
LARGEST_FILE = 32 << 20
PNG = b"\x89PNG\r\n\x1a\n"


def read(paths: list[Path]) -> tuple[dict[str, dict], dict[str, dict[str, bytes]]]:
    """Results and pictures by task. Raises ValueError where a file holds no summary, a task that there is not, or none
    that
    ended well: tasks name files, so that only known ones are taken."""
    results, pictures = {}, {}
    for path in paths:
        try:
            with tarfile.open(path) as tar:
                members = {member.name: member for member in tar if member.isfile()}
                if "summary.json" not in members:
                    raise ValueError("it has no summary.json: it is none that run_tasks.py collected")
                for entry in _summary(_contents(tar, members["summary.json"])):
                    if "results" not in entry:
                        continue
                    task = entry["task"]
                    results[task] = _checked(entry["results"], task)
                    pictures[task] = {
                        name: _picture(tar, members[f"{task}/{name}"])
                        for name in PICTURES
                        if f"{task}/{name}" in members
                    }
        # A damaged archive fails in its readers' own ways.
        except (ValueError, OSError, EOFError, tarfile.TarError, lzma.LZMAError, zlib.error) as error:
            raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    if not results:
        raise ValueError("no task ended well in " + ", ".join(map(str, paths)))
    return results, pictures


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > LARGEST_FILE:
        raise ValueError(f"{member.name!r} has {member.size} bytes, more than {LARGEST_FILE}")
    return tar.extractfile(member).read()


def _picture(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    data = _contents(tar, member)
    if not data.startswith(PNG):
        raise ValueError(f"{member.name!r} is no PNG picture")
    return data


def _summary(data: bytes) -> list[dict]:
    """The entries of a summary, each of a known task."""
    summary = parse_json(decode_text(data, "summary.json"), "summary.json")
    if not isinstance(summary, list) or not all(isinstance(entry, dict) for entry in summary):
        raise ValueError("summary.json must be a list of objects, one a task")
    for entry in summary:
        if not isinstance(entry.get("task"), str) or entry["task"] not in TITLES:
            raise ValueError(f"summary.json: task={entry.get('task')!r} is none of {', '.join(TITLES)}")
    return summary


def _checked(found: object, task: str) -> dict:
    """Results that the table can be made of: numbers are numbers, and no text breaks out of its line."""
    numbers = (
        "test_accuracy",
        "validation_accuracy",
        "steps",
        "best_step",
        "minutes",
        "tokens_per_second",
        "parameters",
    )
    try:
        values = [found[name] for name in numbers] + [found["rows"][name] for name in ("train", "validation", "test")]
        values += list(found["activation_rate_by_layer"])
        command, device = found["command"], found["device"]
        plain = [device, found["versions"]["torch"], found["versions"]["transformers"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"summary.json: the results of task {task!r} are not what train.py writes: {error!r}"
        ) from error
    for value in values:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"summary.json: the results of task {task!r} hold {value!r} where a number should be")
    for text in [command, *plain]:
        # The command stands in a block of code, which only the end of its line ends.
        if not isinstance(text, str) or not text.isprintable() or (text is not command and set(text) & set("<>|`[")):
            raise ValueError(f"summary.json: the results of task {task!r} hold {text!r} where a plain line should be")
    return found


def table(results: dict[str, dict], folder: str) -> str:
    """Markdown: a row a task, then each one's command and pictures. `folder`: of the pictures, seen from the page."""
    lines = [
        "| task | test accuracy | validation | steps (best) | minutes | tokens/s | activated % by layer | parameters "
        "| device |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task in [task for task in TITLES if task in results]:
        found = results[task]
        rates = " ".join(f"{100 * rate:.0f}" for rate in found["activation_rate_by_layer"])
        lines.append(
            f"| {TITLES[task]} | {found['test_accuracy']:.1%} | {found['validation_accuracy']:.1%} | "
            f"{found['steps']:,} ({found['best_step']:,}) | {found['minutes']:.1f} | "
            f"{found['tokens_per_second']:,.0f} | {rates} | {found['parameters']:,} | {found['device']} |"
        )
    for task in [task for task in TITLES if task in results]:
        found = results[task]
        rows, versions = found["rows"], found["versions"]
        lines += [
            "",
            f"### {TITLES[task]}",
            "",
            f"    {found['command']}",
            "",
            f"{rows['train']:,} training, {rows['validation']:,} validation and {rows['test']:,} test rows; torch "
            f"{versions['torch']}, transformers {versions['transformers']}.",
            "",
            *(
                f"![{TITLES[task]}: {name.split('.')[0].replace('_', ' ')}]({folder}/{task}_{name})"
                for name in PICTURES
            ),
        ]
    return "\n".join(lines)


def write_page(page: Path, results: dict[str, dict], pictures: dict[str, dict[str, bytes]]) -> None:
    """Puts the table between the page's marks (a new page gets a title and them), the pictures into images/ and the
    results as they are into a .json of the page's name."""
    folder = page.parent / "images/classification"
    text = page.read_text(encoding="utf-8") if page.is_file() else f"# Classification results\n\n{BEGIN}\n{END}\n"
    head, found, rest = text.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"{str(page)!r} lacks the lines {BEGIN} and {END}, between which the table goes")
    folder.mkdir(parents=True, exist_ok=True)
    for task, named in pictures.items():
        for name, data in named.items():
            with replacing(folder / f"{task}_{name}") as partial:
                partial.write_bytes(data)
    write_json(page.with_suffix(".json"), results, indent=1)
    write_text(page, f"{head}{BEGIN}\n\n{table(results, 'images/classification')}\n\n{END}{tail}")


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collected", nargs="+", type=Path, metavar="FILE.tar.gz")
    parser.add_argument("--page", required=True, type=Path)
    a = parser.parse_args(argv)
    missing = [str(path) for path in a.collected if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"there is no file {', '.join(missing)}")
    write_page(a.page, *read(a.collected))
    print(f"written: {a.page}")


if __name__ == "__main__":
    main()
