"""Hooks of `mkdocs build`: links out of docs/ lead to the repository, pictures there are copied, and the notebook
becomes a page."""

import json
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
NOTEBOOK = "notebooks/first_steps.ipynb"
_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
_PICTURES = (".png", ".svg", ".jpg")


def on_config(config):
    config.repo_url = re.search(r"^git clone (https://\S+)$", (ROOT / "README.md").read_text("utf-8"), re.M)[1]
    config.repo_name = "GitHub"
    return config


def on_files(files, config):
    page = NOTEBOOK.replace(".ipynb", ".md")
    files.append(File.generated(config, page, content=notebook_page(DOCS / NOTEBOOK)))
    if files.get_file_from_path(NOTEBOOK) is not None:
        files.remove(files.get_file_from_path(NOTEBOOK))
    for picture in sorted((ROOT / "benchmarks/results").rglob("*.png")):
        name = "outside/" + picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Raises PluginError for a link out of docs/ that leads nowhere; links within it are checked by mkdocs."""
    here = (DOCS / page.file.src_uri).parent
    up = "../" * (len(Path(page.file.src_uri).parts) - 1)

    def moved(match):
        start, target, anchor, end = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        if target.endswith(NOTEBOOK.split("/")[-1]):
            return f"{start}{target.replace('.ipynb', '.md')}{anchor or ''}{end}"
        path = (here / target).resolve()
        if path.is_relative_to(DOCS):
            return match[0]
        if not path.exists() or not path.is_relative_to(ROOT):
            raise PluginError(f"{page.file.src_uri}: the link {target!r} leads to no file of the repository")
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in _PICTURES:
            return f"{start}{up}outside/{name}{end}"
        return f"{start}{config.repo_url}/blob/main/{name}{anchor or ''}{end}"

    # Blocks of code hold brackets too.
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else _LINK.sub(moved, part) for part in parts)


def notebook_page(path: Path) -> str:
    """The cells of a notebook as Markdown, with the printed outputs that it holds."""
    lines = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [source, ""]
            continue
        lines += ["```python", source, "```", ""]
        printed = "".join("".join(output.get("text", ())) for output in cell["outputs"])
        if printed:
            lines += ["```text", printed.rstrip(), "```", ""]
    return "\n".join(lines)
