"""Checkpoints: one file with all that a run needs to resume, written atomically, read without executing code.

`CheckpointState` lists the contents, all plain values and tensors, so that `torch.load(weights_only=True)` reads them.
The data position is the step: every draw of the data is keyed by it. Randomness needs no saving either, for the same
reason.
"""

import errno
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from pera_fast.durable import whole_file
from pera_fast.errors import UserError
from pera_fast.weights.files import zip_damage

log = logging.getLogger(__name__)

FORMAT = 1
_WRITE_ERRORS = (OSError, RuntimeError)  # torch.save turns some write errors into RuntimeError
_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Required(TypedDict):
    format: int  # FORMAT
    step: int  # optimiser steps done, skipped ones included
    recipe: str
    config: str  # YAML of the resolved configuration
    total_batch: int  # images per optimiser step over all ranks: fixes which images a step takes
    images: int  # readable images of the data; with `data` tells whether it is still the same
    data: str  # digest of the readable images' names in their order
    nonfinite: dict[str, int]  # counters of skipped steps: {"total": int, "row": int}
    model: dict[str, Any]  # state dict: student, teacher, heads, mask token, center
    optimizer: dict[str, Any]  # state dict
    scaler: dict[str, Any]  # state dict; empty unless fp16


class CheckpointState(_Required, total=False):
    """Contents of a checkpoint. Older ones lack the keys that stand here."""

    position: int  # place in the data in steps; equals step unless the total batch changed
    devices: int  # processes of the run
    finetune: dict[str, Any]  # of a fine-tuning: classes, best score, validations


FIELDS: dict[str, type] = {  # those of every checkpoint
    name: str if kind is str else int if kind is int else Mapping for name, kind in _Required.__annotations__.items()
}
_FROM_ONE = ("total_batch", "images", "devices")
_NAME = re.compile(r"step_(\d{8,})\.pt")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Path of the checkpoint after `step` optimiser steps."""
    return folder / f"step_{step:08d}.pt"


def find_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first; none if there is no folder."""
    found = [(int(match[1]), path) for path in folder.glob("step_*.pt") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


class NotWrittenError(UserError):
    """A file of a run that could not be written; the message has the reason."""


def save_checkpoint(folder: Path, state: CheckpointState, keep: int) -> Path:
    """Writes the state atomically, then removes all but the newest `keep` checkpoints.

    On a full disk the older ones go first, but for the newest: then there may be room.

    Raises:
        NotWrittenError: it cannot be written; the partial file is removed and the newest checkpoint stays good.
    """
    path = checkpoint_path(folder, state["step"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(folder.glob(".step_*.pt.partial"))  # of processes that were killed while they wrote
        try:
            _write_whole(path, state)
        except _WRITE_ERRORS as error:
            if _number(error) not in _FULL or len(find_checkpoints(folder)) < 2:
                raise
            log.warning("%s: %s: removing all checkpoints but the newest to make room", folder, _reason(error))
            _prune(folder, 1)
            _write_whole(path, state)
    except _WRITE_ERRORS as error:
        last = find_checkpoints(folder)
        kept = f"the last good one is {last[-1].name}" if last else "there is none yet"
        raise NotWrittenError(f"checkpoint {path} could not be written ({_reason(error)}); {kept}") from error
    _prune(folder, keep)
    return path


def _write_whole(path: Path, state: CheckpointState) -> None:
    with whole_file(path, sync=True) as partial:
        _write(partial, state)


def _write(path: Path, state: CheckpointState) -> None:
    import torch  # here, because what a run folder holds is also looked at before the settings are accepted

    with open(path, "wb") as file:  # torch's own writer ends the process where a file may not grow
        torch.save(dict(state), file)


def _cause(error: BaseException | None) -> OSError | None:
    """The operating system's error, also where torch wrapped it."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error
        error = error.__cause__ or error.__context__
    return None


def _reason(error: BaseException) -> str:
    """The operating system's words where it has any."""
    cause = _cause(error)
    return (cause.strerror if cause else None) or " ".join(str(error).split())[:200]


def _number(error: BaseException) -> int | None:
    cause = _cause(error)
    return None if cause is None else cause.errno


def _prune(folder: Path, keep: int) -> None:
    _remove(find_checkpoints(folder)[:-keep])


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink()
        except OSError as error:
            log.warning("%s could not be removed: %s", path, _reason(error))


class _DamagedError(Exception):
    """A file that is not a whole checkpoint; the message says why."""


def load_newest(folder: Path) -> tuple[Path, CheckpointState] | None:
    """The newest checkpoint of a folder, tensors on the CPU; None if there is none.

    A damaged newest one is not silently passed over: that would throw away steps without the user's consent.

    Raises:
        UserError: the newest is damaged; names it and the newest older good one.
    """
    paths = find_checkpoints(folder)
    if not paths:
        return None
    try:
        return paths[-1], _load(paths[-1])
    except _DamagedError as error:
        good = next((p for p in reversed(paths[:-1]) if _is_whole(p)), None)
        advice = (
            f"delete it to resume from {good.name}" if good else "no older one is good: start anew in another --out"
        )
        raise UserError(f"{paths[-1]}: damaged checkpoint ({error}); {advice}") from None


def load_checkpoint(path: Path) -> CheckpointState:
    """One checkpoint, tensors on the CPU. Raises UserError if it is damaged, missing or not one of ours."""
    try:
        return _load(path)
    except _DamagedError as error:
        raise UserError(f"{path}: damaged checkpoint ({error})") from None


def _is_whole(path: Path) -> bool:
    try:
        _load(path)
    except (_DamagedError, UserError):
        return False
    return True


def _load(path: Path) -> CheckpointState:
    if why := zip_damage(path):
        raise _DamagedError(why)
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes the unpickler raise; unsafe contents raise here as well
        raise _DamagedError(_reason(error).split(". ")[0]) from None
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise _DamagedError("not a checkpoint of pera-fast")
    if state["format"] > FORMAT:
        raise UserError(f"{path}: written by a newer pera-fast (checkpoint format {state['format']}); update pera-fast")
    for name, kind in FIELDS.items():
        if not isinstance(state.get(name), kind):
            raise _DamagedError(f"{name} is missing")
    counts = {name: state[name] for name, kind in FIELDS.items() if kind is int}
    counts |= {name: state.get(name, 1) for name in ("position", "devices")}
    counts |= {f"nonfinite.{name}": state["nonfinite"].get(name) for name in ("total", "row")}
    for name, count in counts.items():
        if type(count) is not int or not (name in _FROM_ONE) <= count < 2**62:
            raise _DamagedError(f"{name} is {count!r:.60}")
    return cast(CheckpointState, state)
