"""`pera-fast data stats`: statistics of a data set's bands, as they are stored and as the networks get them."""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pera_fast.config import Config, load_config
from pera_fast.cores import default_workers
from pera_fast.data.bands.sensor import adopt, is_deep, measure, probe_settings, scaling_of
from pera_fast.data.bands.stats import BandStats
from pera_fast.data.decoding.scaling import LARGEST
from pera_fast.data.files.manifest import Manifest
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index.build import open_or_build
from pera_fast.data.reading.source import SampleSource
from pera_fast.data.tools.band_names import band_descriptions
from pera_fast.errors import UserError
from pera_fast.keyed import Purpose, generator
from pera_fast.progress import progress_bar

PERCENTILES = (0.5, 2.0, 50.0, 98.0, 99.5)
BINS = 256
_TURN = 16  # files that a thread takes at a time


@dataclass
class Measured:
    """Statistics of some files of a data set."""

    cfg: Config  # with the depth and ranges that training would use
    stored: list[BandStats]  # of each channel: values as they are stored, pixels without data left out
    pixels: list[BandStats]  # of each channel: the integers that they become
    files: int  # that were measured
    failed: int  # that could not be read
    of: int  # readable files of the data set
    described: list[str] = field(default_factory=list)  # each channel's band as the files name it; "": not, or not all

    def normalisation(self) -> tuple[list[float], list[float]]:
        """views.mean and views.std: of pixels scaled to [0, 1]."""
        largest = LARGEST[_depth(self.cfg)]
        moments = [band.moments for band in self.pixels]
        std = [max((m.deviation / m.count) ** 0.5 / largest, 1e-4) for m in moments]  # of a constant band: any but 0
        return [round(m.mean / largest, 5) for m in moments], [round(value, 5) for value in std]

    def settings(self) -> list[str]:
        """Settings for `pretrain`."""
        cfg, (mean, std) = self.cfg, self.normalisation()
        lines = []
        if cfg.model.in_chans != 3:
            lines.append(f"model.in_chans={cfg.model.in_chans}")
        if cfg.data.bands:
            lines.append(f"data.bands={_list(cfg.data.bands)}")
        if cfg.data.depth == "16":
            lines.append("data.depth=16")
        if cfg.data.band_range is not None:
            pairs = ",".join(_list(pair) for pair in cfg.data.band_range)
            lines += [f"data.band_scale={cfg.data.band_scale}", f"data.band_range=[{pairs}]"]
        return [*lines, f"views.mean={_list(mean)}", f"views.std={_list(std)}"]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        mean, std = self.normalisation()
        bands = []
        for number, (stored, name) in enumerate(zip(self.stored, self.names(), strict=True)):
            moments, (counts, edges) = stored.moments, stored.histogram(BINS)
            bands.append(
                {
                    "band": name,
                    "name": self.described[number] if self.described else "",
                    "count": moments.count,
                    "min": moments.low,
                    "max": moments.high,
                    "mean": moments.mean,
                    "std": (moments.deviation / moments.count) ** 0.5,
                    "percentiles": dict(zip(map(str, PERCENTILES), stored.percentiles(list(PERCENTILES)), strict=True)),
                    "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
                    "views.mean": mean[number],
                    "views.std": std[number],
                }
            )
        about = {"files": self.files, "failed": self.failed, "readable": self.of, "settings": self.settings()}
        return {**about, "bands": bands}

    def names(self) -> list[str]:
        """Name or number of each channel's band."""
        return [str(band) for band in self.cfg.data.bands or range(1, self.cfg.model.in_chans + 1)]

    def labels(self) -> list[str]:
        """The same with the files' own names of the bands, for people: 4 red."""
        names = self.names()
        told = self.described or names
        return [name if other in ("", name) else f"{name} {other}" for name, other in zip(names, told, strict=True)]


def measure_data(
    data: str | os.PathLike[str],
    *,
    sample: int = 4096,
    seed: int = 0,
    overrides: Sequence[str] = (),
    workers: int | None = None,
    progress: bool = True,
) -> Measured:
    """Reads files of a folder (or of shards, or of a manifest) whole, a keyed sample of them or all.

    Args:
        data: the folder, or a manifest (Parquet) such as a run's index.parquet.
        sample: how many files; 0: all.
        seed: of the choice of files.
        overrides: settings, such as model.in_chans=8 or data.bands=[4,3,2]; without them RGB.
        workers: threads; None: one a core.
        progress: show bars, if there is a terminal.

    Raises:
        UserError: nothing to read, or a band without any value.
    """
    if sample < 0:
        raise UserError(f"--sample {sample}: give a number of files, or 0 for all")
    path = Path(data)
    if path.is_file():
        manifest = Manifest.load(path)
        cfg = load_config("vit_b16", [f"model.in_chans={manifest.settings.channels}", *overrides])
        cfg = cfg.with_values({"data.bands": list(manifest.settings.bands) or cfg.data.bands})
    else:
        cfg = load_config("vit_b16", overrides)
        manifest = open_or_build(path, cfg, progress=progress)
    if not manifest.decided:
        depth = 16 if is_deep(manifest) else 8
        cfg = cfg.with_values({"data.depth": str(depth)})
        measure(cfg, manifest, depth, progress)
    cfg = adopt(cfg, manifest)
    count = len(manifest.readable)
    if not count:
        raise UserError(f"data {data} holds no readable image")
    rows = np.arange(count)
    if 0 < sample < count:
        rows = np.sort(generator(seed, Purpose.MEASURE).permutation(count)[:sample])
    measured = _measure(cfg, manifest, rows, workers or default_workers(), progress)
    measured.described = band_descriptions(manifest, measured.names())
    return measured


def _measure(cfg: Config, manifest: Manifest, rows: np.ndarray, workers: int, progress: bool) -> Measured:
    settings, scaling = probe_settings(cfg), scaling_of(cfg)
    channels = settings.channels
    source = SampleSource(
        manifest, settings, 0, SkippedFiles(os.devnull), sandboxes=workers, timeout=cfg.data.storage_timeout
    )
    total = Measured(cfg, _bands(channels), _bands(channels), 0, 0, len(manifest.readable))
    turns = iter(range(0, len(rows), _TURN))

    def work(advance: Any) -> Measured:
        own = Measured(cfg, _bands(channels), _bands(channels), 0, 0, 0)
        for start in turns:  # the threads share it
            for row in rows[start : start + _TURN].tolist():
                raster = source.raster(row)
                if raster is None:
                    own.failed += 1
                    continue
                pixels = scaling(raster)
                for channel in range(channels):
                    counted = raster.counted(channel)
                    own.stored[channel].add(raster.values(channel), counted)
                    own.pixels[channel].add(pixels[..., channel], counted)
                own.files += 1
            advance(len(rows[start : start + _TURN]))
        return own

    with (
        ThreadPoolExecutor(workers, thread_name_prefix="pera-stats") as pool,
        closing(source),  # before the pool, whose threads may wait for the storage
        progress_bar("measuring", len(rows), wanted=progress) as advance,
    ):
        for part in [pool.submit(work, advance) for _ in range(workers)]:
            _merge(total, part.result())
    for name, band in zip(total.names(), total.stored, strict=True):
        if not band.count:
            raise UserError(f"data {manifest.root}: band {name} has no value in the {len(rows)} file(s) that were read")
    return total


def _bands(channels: int) -> list[BandStats]:
    return [BandStats() for _ in range(channels)]


def _merge(total: Measured, part: Measured) -> None:
    for mine, other in zip(total.stored + total.pixels, part.stored + part.pixels, strict=True):
        mine.merge(other)
    total.files += part.files
    total.failed += part.failed


def _depth(cfg: Config) -> int:
    return 16 if cfg.data.depth == "16" else 8


def _list(values: Sequence[Any]) -> str:
    return "[" + ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values) + "]"


def show(measured: Measured) -> None:
    """Prints a table of the stored values and the settings to paste."""
    from rich.console import Console
    from rich.table import Table

    heads = ["band", "min", *(f"{percent:g} %" for percent in PERCENTILES), "max", "mean", "std"]
    table = Table(*heads, box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for band, label in zip(measured.as_dict()["bands"], measured.labels(), strict=True):
        values = [band["min"], *band["percentiles"].values(), band["max"], band["mean"], band["std"]]
        table.add_row(label, *(f"{value:.5g}" for value in values))
    console = Console(markup=False, highlight=False, soft_wrap=True)
    failed = f", {measured.failed} could not be read" if measured.failed else ""
    console.print(f"stored values of {measured.files} of {measured.of} files{failed}")
    console.print(table)
    console.print("\nsettings for pretraining on these files:")
    for line in measured.settings():
        console.print(f"  {line}")


def write_json(measured: Measured, path: Path) -> None:
    """Everything, with histograms of 256 bins. Raises UserError if it cannot be written."""
    try:
        path.write_text(json.dumps(measured.as_dict(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror or error})") from error
