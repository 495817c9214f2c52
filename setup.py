"""Package metadata and extras; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = ["numpy", "pyyaml", "pillow", "scipy", "webdataset", "safetensors"]
TRAIN = ["torch", "megatron-core", "psutil", "transformers", "tensorboard", "sentencepiece", "protobuf"]

setup(
    name="megatron-vlrl",
    version="0.1.0",
    description="Reinforcement learning with verifiable rewards for Qwen3-VL at pretraining scale",
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_vlrl", "megatron_vlrl.*"]),
    install_requires=CORE,
    extras_require={"cpu": TRAIN},
    entry_points={"console_scripts": ["megatron-vlrl=megatron_vlrl.cli:main"]},
)
