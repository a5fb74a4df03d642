"""Loggers that show a run's numbers elsewhere: TensorBoard, Weights & Biases, MLflow. None of them can end a run."""

import importlib.util
import sys
from collections.abc import Sequence

from pera_fast.config.keys import show
from pera_fast.errors import UserError
from pera_fast.train.loggers import to_mlflow, to_tensorboard, to_wandb
from pera_fast.train.loggers.background import Background
from pera_fast.train.loggers.base import About

_START = {"tensorboard": to_tensorboard.start, "wandb": to_wandb.start, "mlflow": to_mlflow.start}
EXTRAS = ("wandb", "mlflow")  # of the package, and the modules that they bring


def check_loggers(names: Sequence[str]) -> None:
    """Raises UserError, with the command that installs it, for a logger whose package is missing."""
    for name in EXTRAS:
        if name in names and not _installed(name):
            why = f"{name} is not installed: pip install 'pera-fast[{name}]', or leave {name} out"
            raise UserError(f"train.loggers={show(list(names))}: {why}")


def _installed(module: str) -> bool:
    """Whether a module can be found, though perhaps not imported; a mere folder of its name is none."""
    if module in sys.modules:
        return sys.modules[module] is not None
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def make_loggers(names: Sequence[str], about: About) -> list[Background]:
    """The loggers of `train.loggers`; each starts in a thread of its own with the first step that it gets."""
    return [Background(name, _START[name], about) for name in names]
