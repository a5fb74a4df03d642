"""pera-fast: the fastest way to pretrain a vision transformer on remote-sensing images with PerA (arXiv 2505.19447)."""

from collections.abc import Sequence
from os import PathLike
from typing import Literal

from pera_fast.run_result import RunResult

__version__ = "0.2.0"
__all__ = ["RunResult", "__version__", "pretrain"]


def pretrain(
    data: str | PathLike[str],
    out: str | PathLike[str],
    recipe: str | PathLike[str] | None = None,
    resume: bool | Literal["auto"] = False,
    overrides: Sequence[str] = (),
) -> RunResult:
    """Pretrains on the images in `data` and leaves everything in the run folder `out`; the twin of the command line.

    Args:
        data: folder of images, searched recursively.
        out: run folder: configuration, metrics, log, checkpoints, exported teacher.
        recipe: a name that `pera_fast.config.recipe_names()` lists, or a YAML file such as a run's config.yaml. None:
            vit_b16, or with `resume` the run's own.
        resume: go on from the newest checkpoint in `out`. "auto": start where `out` holds no run, and go on where it
            holds one of the same settings, so that one call serves for both.
        overrides: settings such as `["train.steps=60", "train.batch_size=8"]`.

    Returns:
        Its `exit_code` is 0 where the run is done.

    Raises:
        pera_fast.errors.UserError: usage, configuration or data that cannot be run; one line says why.
    """
    # By name, because an import statement here would make the trainer a dependency of everything in the package.
    from importlib import import_module

    early: RunResult | None = import_module("pera_fast.train.early").answer(data, out, recipe, overrides, resume)
    if early is not None:
        return early
    api = import_module("pera_fast.train.api")
    return api.pretrain(data=data, out=out, recipe=recipe, resume=resume, overrides=overrides)
