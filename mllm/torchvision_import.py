"""Makes torchvision importable where its compiled operators do not load: beside a CPU build of torch.

timm and transformers import torchvision for its image transforms, which are plain Python. The wheel on PyPI is compiled
for CUDA; beside torch's CPU build its operators fail to load, which torchvision tolerates, but then it registers shape
functions for them, which fails. Nothing of ours uses these operators.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

SHAPES_OF_OPERATORS = "torchvision._meta_registrations"


def import_timm() -> ModuleType:
    """timm. Raises ImportError where it is not installed (`pip install flashvla_ros[vla]`)."""
    return import_beside_torchvision("timm")


def import_beside_torchvision(name: str) -> ModuleType:
    """The module `name`, which imports torchvision. Raises ImportError where it is not installed."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        sys.modules[SHAPES_OF_OPERATORS] = ModuleType(SHAPES_OF_OPERATORS)
        importlib.import_module("torchvision")
    return importlib.import_module(name)
