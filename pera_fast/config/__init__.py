"""Typed configuration: a tree of dataclasses, recipes that fill it by name, overrides `section.key=value`.

A leaf that every part may import; imports neither torch nor (before a configuration is loaded) OmegaConf.
"""

from pera_fast.config.check import check
from pera_fast.config.load import (
    Differences,
    check_overrides,
    differences,
    from_yaml,
    load_config,
    read_config,
    recipe_names,
    to_yaml,
)
from pera_fast.config.tree import (
    BatchPlan,
    Config,
    DataConfig,
    EvalConfig,
    FinetuneConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    ViewsConfig,
)

__all__ = [
    "BatchPlan",
    "Config",
    "DataConfig",
    "Differences",
    "EvalConfig",
    "FinetuneConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "ViewsConfig",
    "check",
    "check_overrides",
    "differences",
    "from_yaml",
    "load_config",
    "read_config",
    "recipe_names",
    "to_yaml",
]
