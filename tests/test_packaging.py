"""What `pip install` puts where: the presets travel inside the package, and nothing else becomes a module."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import strangers

import modeling_seqboat
from hub_upload.model_card import NEWEST_TESTED, OLDEST_TESTED

ROOT = Path(__file__).parents[1]


def pip(*arguments):
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *map(str, arguments)], check=True, timeout=240)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel of a copy of the sources, installed into a folder of its own."""
    sources, wheels, target = (tmp_path_factory.mktemp(name) for name in ("sources", "wheels", "target"))
    kept_out = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "outputs", "runs", "__pycache__", "goldens")
    shutil.copytree(ROOT, sources, ignore=kept_out, dirs_exist_ok=True)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", wheels, sources)
    (wheel,) = wheels.iterdir()
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def run_there(installed, program, folder):
    """Run a program in a stranger's process that finds the installed package first, from another folder."""
    script = folder / "program.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(installed)!r})\n{program}", encoding="utf-8")
    done = strangers.run(folder, script)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_presets_are_found_after_a_plain_install(installed, tmp_path):
    output = run_there(
        installed,
        "import modeling_seqboat as package\n"
        "print(package.__file__)\n"
        "print(package.SeqBoatConfig.from_preset('enwik8').hidden_size)\n"
        "print(*package.SeqBoatConfig.preset_names())\n",
        tmp_path,
    ).splitlines()
    assert Path(output[0]).is_relative_to(installed)
    assert output[1] == "616"
    assert output[2].split() == modeling_seqboat.SeqBoatConfig.preset_names()


def test_vllm_finds_its_plugin(installed):
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "[vllm.general_plugins]\nseqboat = vllm_seqboat:register\n" in entry_points.read_text() + "\n"
    assert {path.name for path in (installed / "vllm_seqboat").glob("*.py")} >= {"__init__.py", "model.py", "pages.py"}


def test_only_the_packages_become_modules(installed):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} - {
        "__pycache__",
        "bin",
    }
    assert names == {"modeling_seqboat", "hub_upload", "vllm_seqboat"}
    assert (installed / "modeling_seqboat" / "py.typed").is_file()
    shipped = {path.name for path in (installed / "modeling_seqboat").glob("*.py")}
    assert shipped == {path.name for path in (ROOT / "modeling_seqboat").glob("*.py")}


def test_the_metadata_names_version_and_licence(installed):
    (metadata,) = installed.glob("*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    assert f"\nVersion: {modeling_seqboat.__version__}\n" in text
    assert "\nLicense-Expression: MIT\n" in text
    address = re.search(r"^git clone (https://\S+)$", (ROOT / "README.md").read_text("utf-8"), re.M)[1]
    assert f"\nHome-page: {address}\n" in text
    # The index shows the README where none of the files is.
    links = re.findall(r"\]\(([^)]+)\)", text.split("\n\n", 1)[1])
    assert len(links) > 20 and all(link.startswith(("https://", "http://", "#")) for link in links), links
    # What the badges say.
    readme = (ROOT / "README.md").read_text("utf-8")
    python = re.search(r"^Requires-Python: >=(\S+)$", text, re.M)[1]
    assert f"badge/python-%3E%3D{python}-" in readme and "badge/license-MIT-" in readme
    assert f"badge/transformers-{OLDEST_TESTED}%20to%20{NEWEST_TESTED}-" in readme
    assert (metadata.parent / "licenses" / "LICENSE").is_file()


def test_the_changelog_tells_of_this_version_on_top():
    top = re.search(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert top and top[1] == modeling_seqboat.__version__


def test_a_release_is_refused_until_it_is_ready(tmp_path):
    """By the check that the release workflow runs on its tag: another version, no date, no owner of the repository."""
    spec = importlib.util.spec_from_file_location("release_check", ROOT / ".ci/release_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "run: python .ci/release_check.py" in (ROOT / ".github/workflows/release.yml").read_text("utf-8")
    for name in ("modeling_seqboat/__init__.py", "CHANGELOG.md", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    version = modeling_seqboat.__version__
    readme, changelog = tmp_path / "README.md", tmp_path / "CHANGELOG.md"
    readme.write_text(re.sub(r"github\.com/[^/]+/", "github.com/OWNER/", readme.read_text("utf-8")), encoding="utf-8")
    changelog.write_text(f"# Changelog\n\n## {version} (unreleased)\n", encoding="utf-8")
    found = module.problems("v9.9.9", tmp_path)
    assert len(found) == 3 and "v9.9.9" in found[0] and "(unreleased)" in found[1] and "OWNER" in found[2]
    readme.write_text(readme.read_text("utf-8").replace("/OWNER/", "/ann/"), encoding="utf-8")
    changelog.write_text(f"# Changelog\n\n## {version} (2026-12-31)\n", encoding="utf-8")
    assert module.problems(f"v{version}", tmp_path) == []


def test_the_config_file_alone_says_where_presets_come_from(tmp_path):
    """A model folder of the Hub ships the file without presets: it must load, and say so when asked for one."""
    lone = tmp_path / "configuration_seqboat.py"
    shutil.copy(ROOT / "modeling_seqboat" / "configuration_seqboat.py", lone)
    spec = importlib.util.spec_from_file_location("lone_configuration_seqboat", lone)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.SeqBoatConfig().hidden_size == 616
    with pytest.raises(FileNotFoundError, match="presets .* come with the package modeling_seqboat"):
        module.SeqBoatConfig.from_preset("enwik8")


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-min.txt"])
def test_constraints_pin_every_requirement(file):
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    assert all(line.count("==") == 1 and "+" not in line and "/" not in line for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    direct = {"torch", "transformers", "tokenizers", "safetensors", "numpy", "huggingface-hub", "tqdm"}
    assert direct | {"accelerate", "datasets", "peft", "trl", "pytest", "hypothesis"} <= pinned


def test_the_command_finds_its_scripts_after_a_plain_install(installed, tmp_path):
    """`seqboat train` and the like work without a checkout."""
    entry = (next(installed.glob("*.dist-info")) / "entry_points.txt").read_text(encoding="utf-8")
    assert "seqboat = hub_upload.cli:main" in entry
    output = run_there(
        installed,
        "from hub_upload.cli import main\n"
        "try:\n"
        "    main(['evaluate', '--help'])\n"
        "finally:\n"
        "    print(sys.modules['script_start'].__file__)\n",
        tmp_path,
    )
    assert "usage: seqboat evaluate" in output
    assert Path(output.splitlines()[-1]).is_relative_to(installed)
