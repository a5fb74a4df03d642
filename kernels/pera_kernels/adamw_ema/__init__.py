"""AdamW, the teacher's EMA and the half-precision copies of the weights, in one pass over all parameters."""

from .op import AdamWEma
from .reference import Slot

__all__ = ["AdamWEma", "Slot"]
