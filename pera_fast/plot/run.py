"""`pera-fast plot`: reads runs, chooses keys, and writes a PNG or an HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from pera_fast.config.keys import did_you_mean, show
from pera_fast.durable import whole_file
from pera_fast.errors import UserError
from pera_fast.page import Section, grid, render
from pera_fast.paths import local_path, new_file
from pera_fast.plot.runs import UNITS, RunCurves, X, metrics_file, read_run

# Keys to draw where none are named, if a run has them; and every key that is measured now and then only.
USUAL = ("loss", "pixel_loss", "koleo_loss", "lr", "grad_norm", "images_per_s", "data_wait")
SUFFIXES = (".png", ".html")


@dataclass(frozen=True)
class Plotted:
    """The file that was written, and warnings of one line each."""

    summary: str
    warnings: tuple[str, ...]


def plot(
    runs: Sequence[str | PathLike[str]],
    out: str | PathLike[str] = "curves.png",
    keys: Sequence[str] = (),
    smooth: int = 1,
    unit: str = "step",
    overwrite: bool = False,
) -> Plotted:
    """Draws curves of one or several runs, a panel for each key.

    Args:
        runs: run folders, or their metrics.jsonl.
        out: file to write, .png or .html.
        keys: of metrics.jsonl; none: the loss and its parts, learning rate, gradient norm, speed, and all probes.
        smooth: steps over which the drawn mean goes; what it is the mean of is drawn faintly.
        unit: of x: step, epoch or hours.
        overwrite: replace a file that is there.

    Raises:
        UserError: no run, nothing to draw, or the file cannot be written.
    """
    target, unit = _target(out, overwrite), _unit(unit)
    if smooth < 1:
        raise UserError(f"--smooth {smooth}: wants a number of steps, at least 1")
    paths = list(dict.fromkeys(local_path("", run) for run in runs))
    for path in paths:  # all before the first is read, which may take seconds
        metrics_file(path)
    read = [read_run(path, name, unit, smooth) for path, name in zip(paths, _names(paths), strict=True)]
    found = [run for run in read if run.curves]
    warnings = [f"{run.path}: holds no step yet; it is left out" for run in read if not run.curves]
    if not found:
        raise UserError(f"{read[0].path}: holds no step yet; there is nothing to draw")
    drawn, missing = _choose(keys, found)
    _write(target, found, drawn, unit, smooth)
    said = f"{target}: {', '.join(drawn)} of {_counted(len(found), 'run')} over {unit}"
    return Plotted(said, tuple(warnings + missing))


def _target(out: str | PathLike[str], overwrite: bool) -> Path:
    target = new_file("--out", out, overwrite)
    if target.suffix.lower() not in SUFFIXES or not target.absolute().parent.is_dir():
        raise UserError(f"--out {target}: give the name of a .png or .html file in a folder that exists")
    return target


def _unit(text: str) -> X:
    for unit in UNITS:
        if text == unit:
            return unit
    raise UserError(f"--x {show(text)}: allowed: {' | '.join(UNITS)}{did_you_mean(text, UNITS)}")


def _names(paths: Sequence[Path]) -> list[str]:
    """Names of the runs: their folders', with as many folders above as tell them apart."""
    folders = [path.resolve().parent if path.is_file() else path.resolve() for path in paths]
    for depth in range(1, max(len(folder.parts) for folder in folders)):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _choose(asked: Sequence[str], runs: Sequence[RunCurves]) -> tuple[list[str], list[str]]:
    """(keys to draw, warnings about keys that no run has). Raises UserError if none is left."""
    known = list(dict.fromkeys(key for run in runs for key in run.curves))
    if not asked:
        usual = [key for key in USUAL if key in known]
        now_and_then = [key for key in known if key not in usual and any(_sparse(run, key) for run in runs)]
        return [*usual[:1], *now_and_then, *usual[1:]] or known[:1], []
    asked = list(dict.fromkeys(key for text in asked for key in text.replace(" ", "").split(",") if key))
    missing = [key for key in asked if key not in known]
    if len(missing) == len(asked):
        has = ", ".join(known)
        told = ",".join(asked)
        raise UserError(f"--keys {show(told)}: no run has them; known: {has}{did_you_mean(told, known)}")
    warnings = [f"--keys {show(key)}: no run has it; it is left out{did_you_mean(key, known)}" for key in missing]
    return [key for key in asked if key in known], warnings


def _sparse(run: RunCurves, key: str) -> bool:
    return key in run.curves and run.curves[key].sparse and key not in ("nonfinite", "val_seconds")


def _write(target: Path, runs: Sequence[RunCurves], keys: Sequence[str], unit: X, smooth: int) -> None:
    from pera_fast.plot import draw

    if target.suffix.lower() == ".png":
        contents = draw.sheet(runs, keys, unit)
    else:
        contents = _page(runs, keys, draw.panels(runs, keys, unit), unit, smooth).encode()
    try:
        with whole_file(target) as partial:
            partial.write_bytes(contents)
    except OSError as error:
        raise UserError(f"--out {target}: cannot be written ({error.strerror or error})") from None


def _page(runs: Sequence[RunCurves], keys: Sequence[str], pictures: dict[str, bytes], unit: X, smooth: int) -> str:
    rows = [[run.name, str(run.steps), *(_last(run, key) for key in keys)] for run in runs]
    last = Section("Last values", "Of the last step that has the number.", table=grid(["run", "steps", *keys], rows))
    how = "Dots: measured now and then. Bands: least and most of the steps that share a point."
    sections = [Section(key, "", pictures[key], how if number == 0 else "") for number, key in enumerate(keys)]
    names = ", ".join(run.name for run in runs)
    table = {"x": unit, "smoothed over": _counted(smooth, "step"), **{run.name: str(run.path) for run in runs}}
    lead = f"{_counted(len(keys), 'key')} of {_counted(len(runs), 'run')}: {names}."
    return render("Curves of training", lead, {}, [last, *sections], table)


def _last(run: RunCurves, key: str) -> str:
    return f"{run.curves[key].last:.5g}" if key in run.curves else ""


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
