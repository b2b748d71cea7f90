"""The Python files that travel with the weights, so that a folder loads without this package."""

import importlib.metadata
import os
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_imports

import modeling_seqboat
from modeling_seqboat import modeling_seqboat as modeling
from modeling_seqboat.configuration_seqboat import SeqBoatConfig

from .errors import HubUploadError

DISTRIBUTION = "seqboat-transformers"


def auto_classes() -> dict[str, type]:
    """Auto class name -> class of this package: AutoConfig and every head."""
    heads = {auto: getattr(modeling_seqboat, name) for auto, name in modeling.AUTO_CLASSES.items()}
    return {"AutoConfig": SeqBoatConfig, **heads}


def auto_map() -> dict[str, str]:
    """The `auto_map` of config.json: auto class name -> `module.Class`, the modules lying flat beside config.json."""
    return {auto: f"{_module_file(cls).stem}.{cls.__name__}" for auto, cls in auto_classes().items()}


def code_files() -> list[Path]:
    """Source files of the classes in `auto_map` and all that they import by `from .sibling import name`.

    Raises HubUploadError when such an import leads out of the folder, where the Hub would not find it.
    """
    waiting = {_module_file(cls) for cls in auto_classes().values()}
    found: set[Path] = set()
    while waiting:
        file = waiting.pop()
        found.add(file)
        # The function by which transformers finds the files of a repo: what it misses would not be loaded.
        for name in get_relative_imports(file):
            sibling = file.parent / f"{name}.py"
            if not sibling.is_file():
                raise HubUploadError(
                    f"{file.name} imports .{name}, and {sibling.name} does not lie beside it; the Hub follows imports "
                    "of flat siblings only."
                )
            if sibling not in found:
                waiting.add(sibling)
    return sorted(found)


def link_code(folder: str | Path, place: str | Path | None = None) -> None:
    """Make links to `code_files` in a folder, in place of the Python files that are there: a folder that stays in the
    checkout of this package is complete with them, and there is no copy to go stale.

    Args:
        folder: where the links are made.
        place: where the folder will lie, if not at `folder`: the links are relative to it.
    """
    for file in Path(folder).glob("*.py"):
        file.unlink()
    for file in code_files():
        (Path(folder) / file.name).symlink_to(os.path.relpath(file, Path(place or folder).resolve()))


def license_file() -> Path:
    """The licence of the code. Raises HubUploadError when this installation has none."""
    beside = Path(modeling_seqboat.__file__).resolve().parent.parent / "LICENSE"
    if beside.is_file():
        return beside
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "LICENSE":
            return Path(file.locate())
    raise HubUploadError(f"no LICENSE at {beside} nor in the installed package; the code must not travel without it.")


def _module_file(cls: type) -> Path:
    module = cls.__module__.rsplit(".", 1)[-1]
    return Path(modeling_seqboat.__file__).resolve().parent / f"{module}.py"
