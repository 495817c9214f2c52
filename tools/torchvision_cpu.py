"""Lets a CUDA build of torchvision import beside a CPU build of torch.

torchvision registers fake kernels for `torchvision::nms` and `torchvision::qnms` while it is imported (its
_meta_registrations.py), which fails where its C++ extension, and with it those operators' schemas, cannot load:
a CUDA extension needs CUDA libraries. Transformers then takes torchvision for absent, and AutoProcessor silently
returns a bare tokenizer. Declaring the two schemas first is enough: the image transforms are plain torch.

Installed as a module of site-packages with a `.pth` line `import torchvision_cpu`, so it runs at interpreter start:
there it only adds one entry to `sys.meta_path`. It does nothing where torch has CUDA or the extension loads.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = "{}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
OPERATORS = ("nms", "qnms")
_libraries: list[object] = []  # torch forgets a library's definitions when the object dies


def _extension_loads(folder: Path) -> bool:
    import torch

    for path in sorted(folder.glob("_C*.so")):
        try:
            torch.ops.load_library(str(path))
        except OSError:
            return False
        return True
    return False


def declare_operators(folder: Path) -> bool:
    """Declare the schemas that torchvision's import needs; False when that was unnecessary."""
    import torch

    if torch.version.cuda is not None or _extension_loads(folder):
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(SCHEMA.format(name))
    _libraries.append(library)
    return True


class _Loader(importlib.machinery.SourceFileLoader):
    """Runs torchvision's `__init__` after the declarations."""

    def exec_module(self, module: ModuleType) -> None:
        from pathlib import Path

        declare_operators(Path(self.path).parent)
        super().exec_module(module)


class _Finder:
    """Answers for `torchvision` alone; looking for it without importing it stays free of torch."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Put the finder before the standard ones, once."""
    if not any(getattr(entry, "__qualname__", "") == _Finder.__qualname__ for entry in sys.meta_path):
        sys.meta_path.insert(0, _Finder)


install()
