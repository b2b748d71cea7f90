"""The README: its commands and blocks run in their order in a fresh checkout, and once more; links lead somewhere."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
# (what a comment above the block says it needs, language, text)
BLOCKS = re.findall(r"(?:^<!-- needs (.+?) -->\n)?^```(bash|python)\n(.*?)^```$", README, re.M | re.S)
# How a command says what is wrong: its name, and one line.
ERROR = re.compile(r"([\w.-]+ ){0,3}([\w.-]+: )?error: ")
# Added to commands that take minutes: their last option wins.
SHORTER = {"seqboat train": "--max_steps 4 --eval_tokens 2048", "python examples/quickstart.py": "--fast"}
# Done before the test, or by somebody else: what is behind `&&` is run.
NOT_HERE = ("git clone", "cd ", "pip install", "pytest")


def commands():
    """(needs, language, command) in order; a block of Python is one command."""
    for needs, language, text in BLOCKS:
        if language == "python":
            yield needs, language, text
            continue
        for line in text.replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                if command.strip() and not command.startswith(NOT_HERE):
                    yield needs, language, command


@pytest.fixture
def checkout(tmp_path):
    """A copy of what git knows and does not ignore, without outputs."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git, in a checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        target = tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, target)
    return tmp_path / "checkout"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_block_runs_in_order_and_again(checkout):
    """As a newcomer follows the page, twice. What needs a GPU or data is refused by a line that says what is missing;
    what would write over the first time's files, by one that names the option."""
    for package in ("accelerate", "peft", "matplotlib", "tensorboard"):
        pytest.importorskip(package)
    programs = checkout.parent / "programs"
    programs.mkdir()
    # The command as pip makes it, for this interpreter.
    python = shlex.quote(sys.executable)
    entry = "import sys; from hub_upload.cli import main; sys.exit(main())"
    (programs / "seqboat").write_text(f'#!/bin/sh\nexec {python} -c "{entry}" "$@"\n')
    (programs / "python").write_text(f'#!/bin/sh\nexec {python} "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = {
        **os.environ, "PYTHONPATH": str(checkout), "PATH": f"{programs}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    found = list(commands())
    assert [language for _, language, _ in found].count("python") == 1 and len(found) >= 7
    for again in (False, True):
        for needs, language, command in found:
            shortened = command
            for start, options in SHORTER.items():
                shortened += f" {options}" * command.startswith(start)
            start = ["python", "-c", command] if language == "python" else ["bash", "-c", shortened]
            done = subprocess.run(start, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600)
            shown = f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
            assert "Traceback" not in done.stderr, shown
            errors = [line for line in done.stderr.splitlines() if ERROR.match(line)]
            if needs:
                assert done.returncode and len(errors) == 1, shown
                assert "GPU" in errors[0] or "enwik8" in errors[0], shown
            elif not again or not errors:
                assert done.returncode == 0, shown
            else:
                assert done.returncode and len(errors) == 1 and "overwrite" in errors[0], shown
            if language == "python":
                assert "The [[Mediterranean Sea]] is" in done.stdout, shown


def test_is_short_and_has_a_table_of_contents():
    lines = README.splitlines()
    assert len(lines) <= 180
    headings = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    linked = dict(re.findall(r"\[([^\]]+)\]\((#[^)]+)\)", README))
    for heading in headings:
        assert linked.get(heading) == "#" + heading.lower().replace(" ", "-")


def test_no_block_of_python_is_longer_than_promised():
    for _, language, text in BLOCKS:
        assert language != "python" or len([line for line in text.splitlines() if line.strip()]) <= 8, text


@pytest.mark.parametrize(
    "page, command",
    [
        ("README.md", 'pip install -c constraints.txt -e ".[train]" && python examples/quickstart.py'),
        ("README.md", 'pip install -c constraints.txt -e ".[test]" && pytest -n logical --dist loadfile'),
        ("docs/platforms.md", 'pip install -c constraints-min.txt -e ".[test]" && pytest -n logical --dist loadfile'),
    ],
)
def test_gives_the_commands(page, command):
    assert command in (ROOT / page).read_text("utf-8")
    assert (ROOT / re.search(r"-c (\S+)", command)[1]).exists()


def test_links_point_to_files():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", README):
        assert (ROOT / target).exists(), target
