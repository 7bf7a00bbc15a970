"""Packaging of viasd_calib; the tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"


def read_version() -> str:
    """Return ``__version__`` from the package's source, without importing it."""
    source = (ROOT / "viasd_calib" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__(?:\s*:\s*\w+)?\s*=\s*"([^"]+)"', source, re.MULTILINE)
    if match is None:
        raise RuntimeError('viasd_calib/__init__.py holds no line __version__ = "..."')
    return match.group(1)


# `make lowest` tests the lower end of each range, `make newest` the upper one, and `make test` the versions of
# constraints.txt, which a fresh clone gets. Libraries that rename or remove in minor versions end at the next minor
# one, since such a release broke this project before; the others at the next major one.
REQUIREMENTS = [
    "torch>=2.8,<2.14",
    "transformers>=5.16,<5.25",
    "lightning>=2.5,<2.7",
    "jsonargparse[signatures]>=4.48,<4.54",
    "datasets>=4,<5.3",
    "pyarrow>=18,<27",
    "peft>=0.20,<0.22",
    "accelerate>=1.15,<2",  # models without the memory of their layers
    "scikit-learn>=1.5,<1.10",
    "scipy>=1.14.1,<1.19",  # Student's t of paired intervals
    "torchmetrics>=1.4.0.post0,<1.10",
    "mapie>=1.4,<1.7",  # 1.4: fixed-sequence testing
    "pydantic>=2.11,<3",
    "pyyaml>=6.0.4,<7",
    "rich>=14.1,<16",  # progress bars may stand within each other
    "matplotlib>=3.9,<4",
    "safetensors>=0.8,<0.9",
    "huggingface_hub>=1.5,<2.5",
    "gguf>=0.17,<0.20",
    "jinja2>=3.1.6,<4",
    "numpy>=2,<2.5",
]

# torch for CUDA demands the version of Triton it was built with (2.8: 3.4, 2.13: 3.7); the range holds them all.
GPU = ["triton>=3.4,<3.8; platform_system == 'Linux'"]

GPU_CHECK = [*GPU, "setuptools>=77.0.1,<82", "pytest>=8.4,<10", "hypothesis>=6.130,<7"]  # all that `make gpu` needs

SEARCH = ["optuna>=4,<6"]  # the method dimr of viasd search

NOTEBOOKS = ["ipykernel>=6.29,<8", "nbmake>=1.5,<2"]

DOCS = [
    "zensical>=0.0.73,<0.1",
    "mkdocstrings[python]>=1,<2",
]

DEV = [
    "setuptools>=77.0.1,<82",  # the tests build a wheel
    "pytest>=8.4,<10",
    "pytest-timeout>=2.3.1,<3",
    "pytest-xdist>=3.6.1,<4",
    "pytest-cov>=6,<8",
    "hypothesis>=6.130,<7",
    "jsonschema>=4.26,<5",  # the tests validate specs by the published JSON Schema
    "ruff>=0.17,<0.18",  # a new minor version may format differently
    "mypy>=2.4,<2.5",
    "pylint>=4,<5",  # for code that stands twice, which ruff does not look for
    "pre-commit>=4,<5",
    *DOCS,
    *NOTEBOOKS,
    *SEARCH,
    *GPU,  # the tests interpret and compile the kernels without a GPU
]

setup(
    name="viasd_calib",
    version=read_version(),
    description="Train, calibrate and evaluate the routing of three-tier speculative decoding (VIA-SD).",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="viasd_calib developers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["speculative decoding", "large language models", "calibration", "risk control"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # What viasd_calib.shipped finds: in a clone it stays at the top level, in a wheel it lies in the package.
    packages=[
        *find_packages(include=["viasd_calib", "viasd_calib.*"]),
        "viasd_calib.configs",
        "viasd_calib.checkpoints",
    ],
    package_dir={"viasd_calib.configs": "configs", "viasd_calib.checkpoints": "checkpoints"},
    package_data={
        "viasd_calib": [
            "py.typed",
            "data/*.jsonl",
            "schemas/*.json",
            "evaluation/templates/*",
            "slim/native/*.h",
            "slim/native/*.cpp",
        ],
        "viasd_calib.configs": ["*.yaml", "*/*.yaml"],
        "viasd_calib.checkpoints": ["smollm2-135m/*.json", "smollm2-135m/*.md", "smollm2-135m/*/*"],
    },
    install_requires=REQUIREMENTS,
    extras_require={
        "dev": DEV,
        "docs": DOCS,
        "gpu": GPU,
        "gpu-check": GPU_CHECK,
        "notebooks": NOTEBOOKS,
        "search": SEARCH,
    },
    entry_points={"console_scripts": ["viasd = viasd_calib.cli:main"]},
)
