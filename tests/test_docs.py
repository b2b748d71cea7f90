"""The documentation: every block of Python of the guides runs, and so does the notebook."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
GUIDES = sorted((DOCS / "guides").glob("*.md"))
NOTEBOOK = DOCS / "notebooks/first_steps.ipynb"
# Each page in names of its own, all in one process: importing takes longer than most pages.
RUNNER = """
import json, sys, time, torch
for name, code in json.load(open("pages.json", encoding="utf-8")):
    start = time.perf_counter()
    torch.manual_seed(0)
    exec(compile(code, name, "exec"), {"__name__": "__main__"})
    print(f"PAGE {name}: {time.perf_counter() - start:.0f} s", flush=True)
"""


def code_of(page: Path) -> str:
    """The Python of a guide or of a notebook, in order."""
    if page.suffix == ".ipynb":
        cells = json.loads(page.read_text("utf-8"))["cells"]
        return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_guides_and_notebook_run(tmp_path):
    """As copied from the page, from the root of a checkout."""
    for package in ("accelerate", "datasets", "peft", "trl"):
        pytest.importorskip(package)
    for folder in ("examples", "configuration"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    pages = [page for page in [*GUIDES, NOTEBOOK] if code_of(page)]
    (tmp_path / "pages.json").write_text(json.dumps([[page.name, code_of(page)] for page in pages]), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1100
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert re.findall(r"^PAGE (\S+):", done.stdout, re.M) == [page.name for page in pages]


def test_every_guide_is_listed():
    index, site = (DOCS / "index.md").read_text("utf-8"), (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in GUIDES:
        assert f"(guides/{page.name})" in index and f"guides/{page.name}\n" in site, page.name
