"""What must be so before a version is published; run by the release workflow, and by hand before the tag.

    python .ci/release_check.py vX.Y.Z

Prints what is not, a line each. The exit status is 1 if there is anything.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """What keeps the version of `tag` in the checkout `root` from being published."""
    version = re.search(r'^__version__ = "(.+)"$', (root / "modeling_seqboat/__init__.py").read_text("utf-8"), re.M)[1]
    top = re.search(r"^## (.+)$", (root / "CHANGELOG.md").read_text("utf-8"), re.M)[1]
    found = []
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, but modeling_seqboat/__init__.py has version {version}")
    if not re.fullmatch(re.escape(version) + r" \(\d{4}-\d\d-\d\d\)", top):
        found.append(f"CHANGELOG.md begins with {top!r}; it should be {version!r} and the date, as (2026-12-31)")
    if "github.com/OWNER/" in (root / "README.md").read_text("utf-8"):
        found.append("README.md has OWNER in its `git clone`; put the owner of the repository there")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python .ci/release_check.py vX.Y.Z")
    found = problems(sys.argv[1])
    print("\n".join(found) or f"{sys.argv[1]} can be published")
    sys.exit(bool(found))
