"""Writes the results of `run_tasks.py --collect` into a page: a table, with the pictures and all numbers beside it.

    python examples/classification/report.py tasks.tar.gz [MORE.tar.gz] --page docs/classification.md

The table stands between two comment lines of the page; what is written around them stays. Of a task in several files the
last one counts.
"""

import argparse
import json
import tarfile
from pathlib import Path

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
PICTURES = ("confusion_matrix.png", "activations.png")
TITLES = {
    "text": "LRA text (IMDB bytes)", "image": "LRA image (CIFAR-10, grey)", "listops": "LRA ListOps",
    "pathfinder": "LRA Pathfinder 32", "retrieval": "retrieval", "speech": "raw speech (4 words)",
}  # fmt: skip


def read(paths: list[Path]) -> tuple[dict[str, dict], dict[str, dict[str, bytes]]]:
    """Results and pictures by task. Raises ValueError where a file holds no summary, or no task that ended well."""
    results, pictures = {}, {}
    for path in paths:
        with tarfile.open(path) as tar:
            names = tar.getnames()
            if "summary.json" not in names:
                raise ValueError(f"{str(path)!r} has no summary.json: it is none that run_tasks.py collected")
            for entry in json.loads(tar.extractfile("summary.json").read()):
                if "results" not in entry:
                    continue
                task = entry["task"]
                results[task] = entry["results"]
                pictures[task] = {
                    name: tar.extractfile(f"{task}/{name}").read() for name in PICTURES if f"{task}/{name}" in names
                }
    if not results:
        raise ValueError("no task ended well in " + ", ".join(map(str, paths)))
    return results, pictures


def table(results: dict[str, dict], folder: str) -> str:
    """Markdown: a row a task, then each one's command and pictures. `folder`: of the pictures, seen from the page."""
    lines = [
        "| task | test accuracy | validation | steps (best) | minutes | tokens/s | activated % by layer | parameters | device |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task in [task for task in TITLES if task in results]:
        found = results[task]
        rates = " ".join(f"{100 * rate:.0f}" for rate in found["activation_rate_by_layer"])
        lines.append(
            f"| {TITLES[task]} | {found['test_accuracy']:.1%} | {found['validation_accuracy']:.1%} | "
            f"{found['steps']:,} ({found['best_step']:,}) | {found['minutes']:.1f} | {found['tokens_per_second']:,.0f} | "
            f"{rates} | {found['parameters']:,} | {found['device']} |"
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
    """Puts the table between the page's marks (a new page gets a title and them), the pictures into images/ and the results
    as they are into a .json of the page's name."""
    folder = page.parent / "images/classification"
    text = page.read_text(encoding="utf-8") if page.is_file() else f"# Classification results\n\n{BEGIN}\n{END}\n"
    head, found, rest = text.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"{str(page)!r} lacks the lines {BEGIN} and {END}, between which the table goes")
    folder.mkdir(parents=True, exist_ok=True)
    for task, named in pictures.items():
        for name, data in named.items():
            (folder / f"{task}_{name}").write_bytes(data)
    page.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page.write_text(f"{head}{BEGIN}\n\n{table(results, 'images/classification')}\n\n{END}{tail}", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
