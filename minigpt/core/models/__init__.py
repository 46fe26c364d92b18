"""The registry of architectures: the file name is the Hugging Face `model_type`."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from minigpt.core.errors import DataError

_PARTS = {"config", "decoder", "flops", "folder", "presets"}  # files of this package that are no architecture


def model_types() -> list[str]:
    """Every supported `model_type`."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _PARTS)


def architecture(model_type: str) -> ModuleType:
    """The module of an architecture: its `Config` and `make_block(cfg, index)`. DataError lists the supported ones."""
    if model_type not in model_types():
        raise DataError(
            "this model_type is not supported",
            found=str(model_type),
            fix=f"supported: {', '.join(model_types())}",
        )
    return importlib.import_module(f"{__name__}.{model_type}")
