"""Writes tasks for EleutherAI's lm-evaluation-harness: bits per byte and recall at several lengths of bytes.

    python examples/long_context/lm_eval_tasks.py --output_dir outputs/lm_eval --lengths 4096 16384 65536
    lm_eval --model hf --model_args pretrained=MODEL,dtype=bfloat16,max_length=131072 --batch_size 1 \
        --include_path outputs/lm_eval --tasks long_bytes

Each task is a YAML file beside its JSON lines; their paths are absolute, so the folder must not be moved. `long_bytes`
is the group of all. lm-eval itself is not needed here.

* `bits_per_byte_N`: documents of N bytes, scored whole (loglikelihood_rolling).
* `niah_multikey_N`: facts ("The secret number of qzx is 4821.") in a text of N bytes; one is asked for.
* `niah_multivalue_N`: one name has several numbers in the text; all are asked for, in their order.
* `variable_tracking_N`: "VAR abc = 4821", "VAR xyz = VAR abc", ... among other chains; the value of a chain's last
  variable.

The last three are in the style of RULER (arXiv 2404.06654), at bytes: prompts of at most N bytes, one line each to
generate.
"""

import sys
from pathlib import Path

# The examples share modules, which lie one folder up.
sys.path.append(str(Path(__file__).resolve().parent.parent))
import script_start  # noqa: F401, before torch

# isort: split
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import yaml
from recall_models import EXCERPT
from recall_tasks import spread
from recipes import check_output_folder, parse_arguments
from safe_files import write_text
from text_data import read_text_file

GROUP = "long_bytes"


@dataclass
class TaskFileArguments:
    output_dir: str = field(metadata={"help": "must be new or empty"})
    lengths: list[int] = field(default_factory=lambda: [4096, 16_384, 65_536])
    texts: int = field(default=50, metadata={"help": "documents a task"})
    text: str = field(default=str(EXCERPT), metadata={"help": "plain, .gz or .xz; enwik8's last 5 % is used of it"})
    facts: int = field(default=6, metadata={"help": "facts, values or links of a text"})
    seed: int = field(default=0)
    overwrite_output_dir: bool = field(default=False)


def _name(generator: np.random.Generator) -> str:
    return "".join(chr(ord("a") + letter) for letter in generator.integers(0, 26, 4))


def _names(generator: np.random.Generator, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_name(generator)] = None
    return list(found)


def _number(generator: np.random.Generator) -> str:
    return str(generator.integers(1000, 10_000))


def planted(text: bytes, lines: list[str], question: str, length: int, generator: np.random.Generator) -> str:
    """A prompt of at most `length` bytes: a piece of the text with the lines in it, in order, and the question.

    Raises ValueError where the lines do not fit.
    """
    pieces = [f"\n{line}\n".encode() for line in lines]
    room = length - len(question.encode()) - sum(map(len, pieces))
    if room < 0:
        raise ValueError(f"a prompt of {length} bytes is too short for its {len(lines)} lines: use a longer one")
    first = int(generator.integers(0, len(text)))
    body = np.take(np.frombuffer(text, np.uint8), np.arange(first, first + room), mode="wrap").tobytes()
    parts, begin = [], 0
    for place, piece in zip(spread(generator, len(pieces), 0, room), pieces, strict=True):
        parts += [body[begin:place], piece]
        begin = place
    parts.append(body[begin:])
    # A cut may halve a character: what is left of it goes.
    return "".join(part.decode("utf-8", errors="ignore") for part in parts) + question


def multikey(text: bytes, length: int, count: int, generator: np.random.Generator) -> dict[str, str]:
    names, numbers = _names(generator, count), [_number(generator) for _ in range(count)]
    asked = int(generator.integers(0, count))
    lines = [f"The secret number of {name} is {number}." for name, number in zip(names, numbers, strict=True)]
    return {
        "prompt": planted(text, lines, f"\nThe secret number of {names[asked]} is", length, generator),
        "answer": numbers[asked] + ".",
    }


def multivalue(text: bytes, length: int, count: int, generator: np.random.Generator) -> dict[str, str]:
    name, numbers = _name(generator), [_number(generator) for _ in range(count)]
    lines = [f"One of the secret numbers of {name} is {number}." for number in numbers]
    return {
        "prompt": planted(text, lines, f"\nAll secret numbers of {name} are", length, generator),
        "answer": ", ".join(numbers) + ".",
    }


def variable_tracking(text: bytes, length: int, count: int, generator: np.random.Generator) -> dict[str, str]:
    chains, names = 2, _names(generator, 2 * count)
    values = [_number(generator) for _ in range(chains)]
    links = []
    for chain in range(chains):
        own = names[chain * count : (chain + 1) * count]
        links.append([f"VAR {own[0]} = {values[chain]}."])
        links[-1] += [f"VAR {new} = VAR {old}." for old, new in zip(own[:-1], own[1:], strict=True)]
    # Chains are mixed, each in its order.
    turns = generator.permutation(np.repeat(np.arange(chains), count))
    lines = [links[chain].pop(0) for chain in turns]
    asked = int(generator.integers(0, chains))
    question = f"\nThe value of VAR {names[(asked + 1) * count - 1]} is"
    return {"prompt": planted(text, lines, question, length, generator), "answer": values[asked] + "."}


RECALL: dict[str, Callable] = {
    "niah_multikey": multikey,
    "niah_multivalue": multivalue,
    "variable_tracking": variable_tracking,
}


def documents(text: bytes, length: int, count: int) -> list[dict[str, str]]:
    """Pieces of `length` bytes, evenly over the text; fewer where they would overlap.

    Raises ValueError where the text is shorter than one.
    """
    if len(text) < length:
        raise ValueError(f"the text has {len(text)} bytes, too few for a document of {length}")
    count = min(count, len(text) // length)
    starts = np.linspace(0, len(text) - length, count).astype(int)
    return [{"text": text[s : s + length].decode("utf-8", errors="ignore")} for s in starts]


def recall_task(name: str, data: Path) -> dict:
    """The mapping that lm-eval reads from YAML, for a task that generates one line."""
    return _task(name, data) | {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 64},
        "filter_list": [{"name": "line", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": False}
        ],
    }


def text_task(name: str, data: Path) -> dict:
    """The same for documents that are scored whole."""
    return _task(name, data) | {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "should_decontaminate": False,
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    }


def _task(name: str, data: Path) -> dict:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }


def main(argv: list[str] | None = None) -> list[str]:
    a = parse_arguments(TaskFileArguments, argv)
    if a.facts < 1 or a.texts < 1:
        raise ValueError(f"facts and texts must be at least 1, got {a.facts} and {a.texts}")
    text = read_text_file(a.text)
    if len(text) > 10**7:
        text = text[len(text) * 95 // 100 :]
    output = check_output_folder(a.output_dir, False, a.overwrite_output_dir)
    output.mkdir(parents=True, exist_ok=True)
    names = []
    for length in a.lengths:
        rows = {f"bits_per_byte_{length}": documents(text, length, a.texts)}
        for kind, make in RECALL.items():
            generator = np.random.default_rng((a.seed, length, sorted(RECALL).index(kind)))
            rows[f"{kind}_{length}"] = [make(text, length, a.facts, generator) for _ in range(a.texts)]
        for name, lines in rows.items():
            data = (output / f"{name}.jsonl").resolve()
            write_text(data, "".join(json.dumps(line) + "\n" for line in lines))
            task = text_task(name, data) if name.startswith("bits") else recall_task(name, data)
            _write(output / f"{name}.yaml", task)
            names.append(name)
    _write(output / f"{GROUP}.yaml", {"group": GROUP, "task": names})
    print(f"{len(names)} tasks in {output}: lm_eval --include_path {output} --tasks {GROUP}")
    return names


def _write(path: Path, content: dict) -> None:
    write_text(path, yaml.safe_dump(content, sort_keys=False))


if __name__ == "__main__":
    main()
