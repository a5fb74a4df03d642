"""Makes `import timm` work where torchvision is not installed.

timm imports torchvision for its image transforms and datasets, none of which these tests use: they need timm's
`VisionTransformer` alone, as the independent reader of exported weights. Where torchvision is there, nothing is done.
"""

import enum
import importlib.util
import sys
import types
from typing import ClassVar

from torch import nn

_MODULES = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.utils",
)


class _StandIn(types.ModuleType):
    """A module whose unknown public names are empty classes, enough for `from ... import Name` and `isinstance`."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class _InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _FrozenBatchNorm2d(nn.Module):
    pass


def import_timm() -> types.ModuleType:
    """Returns the timm package; while it is being imported, a stand-in takes torchvision's place if that is absent."""
    if "timm" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        import timm

        return timm
    stand_ins = {name: _StandIn(name) for name in _MODULES}
    for name in _MODULES[1:]:
        parent, _, child = name.rpartition(".")
        setattr(stand_ins[parent], child, stand_ins[name])
    for name in ("torchvision.transforms", "torchvision.transforms.functional"):
        stand_ins[name].__dict__["InterpolationMode"] = _InterpolationMode
    stand_ins["torchvision.ops.misc"].__dict__["FrozenBatchNorm2d"] = _FrozenBatchNorm2d
    sys.modules.update(stand_ins)
    try:
        import timm
    finally:  # nothing else shall take the stand-in for the real thing
        for name in _MODULES:
            sys.modules.pop(name, None)
    return timm
