"""Answers that a call of `pretrain` gets before PyTorch is loaded: wrong settings, and a run that is done already."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from pera_fast.config import Config, check_overrides, load_config, read_config
from pera_fast.durable import read_object
from pera_fast.errors import UserError
from pera_fast.paths import refuse_url
from pera_fast.run_result import RunResult
from pera_fast.train.checkpoint import checkpoint_path, find_checkpoints
from pera_fast.train.run_folder import RunFolder, check_asked, continue_config, replace_text

MAIN_SPEAKS_SECONDS = 5.0


def answer(
    data: str | PathLike[str],
    out: str | PathLike[str],
    recipe: str | PathLike[str] | None,
    overrides: Sequence[str],
    resume: bool | Literal["auto"],
) -> RunResult | None:
    """Checks what was given, and returns the result of a run that `--resume` finds done; None: there is work to do.

    Raises:
        UserError: settings that cannot be, a URL for a path.
    """
    try:
        refuse_url("--data", data)
        refuse_url("--out", out)
        requested = None
        if resume is True:
            check_overrides(overrides)  # the run's own settings are those to check them with
        else:
            requested = load_config(recipe or "vit_b16", overrides)
        folder = RunFolder(Path(out))
        if not resume or not folder.finished.exists():
            return None
        saved = read_config(folder.config)
        if requested is None:
            cfg, _ = continue_config(saved, recipe, overrides, str(folder.root))
        else:
            check_asked(folder, folder.read_asked() or saved, requested)
            cfg = saved
        return _finished(folder, cfg)
    except OSError:  # whatever is the matter with the folder: the trainer finds it too, and says so
        return None
    except UserError as error:
        let_main_speak(error)
        raise


def write_finished(folder: RunFolder, step: int, position: int, steps_per_epoch: int, total_batch: int) -> None:
    """Notes that the run is done after so many steps, at this place in the data, for `answer`; on a full disk not."""
    about = {"step": step, "position": position, "steps_per_epoch": steps_per_epoch, "total_batch": total_batch}
    with contextlib.suppress(UserError):  # without it the run is resumed the long way
        replace_text(folder.finished, json.dumps(about) + "\n")


def _finished(folder: RunFolder, cfg: Config) -> RunResult | None:
    """The result of a run that has nothing left to do with this configuration."""
    try:
        done: dict[str, Any] = read_object(folder.finished)
        if not all(type(done[name]) is int for name in ("step", "position", "steps_per_epoch", "total_batch")):
            return None
        step, place, length = done["step"], done["step"], cfg.train.steps
        if length is None:
            place, length = done["position"], cfg.train.epochs * done["steps_per_epoch"]
        same = cfg.train.resolve_batch(int(os.environ.get("WORLD_SIZE", "1"))).total == done["total_batch"]
    except (ValueError, KeyError, TypeError, UserError):
        return None
    newest = find_checkpoints(folder.checkpoints)[-1:]
    if place < length or not same or not folder.teacher.exists():
        return None
    if newest != [checkpoint_path(folder.checkpoints, step)]:
        return None
    if os.environ.get("RANK", "0") == "0":
        print(f"{folder.root}: all {step} steps are done; with a greater train.steps the run goes on", flush=True)
    return RunResult(0, folder.root, step)


def let_main_speak(error: UserError) -> None:
    """Called on the way out. Ranks other than 0 give it the time to tell the user first.

    torchrun ends all processes as soon as one is gone. Mostly all fail for the same reason, and rank 0 is to say so,
    once; a rank that alone has trouble says it itself.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(MAIN_SPEAKS_SECONDS)
        print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
