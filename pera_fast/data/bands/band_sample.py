"""Samples values of a data set's bands, from a keyed choice of its files and pixels."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from pera_fast.cores import default_workers
from pera_fast.data.bands.stats import BandStats
from pera_fast.data.decoding.probe import ProbeSettings
from pera_fast.data.decoding.scaling import Raster
from pera_fast.data.files.manifest import Manifest
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.reading.source import SampleSource
from pera_fast.errors import UserError
from pera_fast.keyed import Purpose, generator
from pera_fast.progress import progress_bar
from pera_fast.storage import TIMEOUT

FILES = 256  # of a sample
PIXELS = 2**16  # of each of them
_DIGITS = 6


@dataclass
class BandSample:
    """Stored values of each channel, pixels without data left out."""

    bands: list[BandStats]  # of each channel
    files: int  # that were measured

    def ranges(self, low: float, high: float) -> list[list[float]]:
        """[low percentile, high percentile] of each channel, of six digits; one apart where a channel is constant."""
        ranges = []
        for band in self.bands:
            bottom, top = (float(f"{value:.{_DIGITS}g}") for value in band.percentiles([low, high]))
            ranges.append([bottom, top if top > bottom else bottom + 1])
        return ranges


def sample_bands(
    manifest: Manifest,
    settings: ProbeSettings,
    seed: int,
    *,
    files: int = FILES,
    pixels: int = PIXELS,
    only_deep: bool = False,
    progress: bool = True,
    timeout: float = TIMEOUT,
) -> BandSample:
    """Reads a sample of the readable files: the same one whenever manifest and seed are.

    Args:
        manifest: of the data folder.
        settings: which bands.
        seed: of the choice of files.
        files: the most that are read.
        pixels: about as many of each, on a grid over the image.
        only_deep: leave out files of 8 bits.
        progress: show a bar, if there is a terminal.
        timeout: seconds that are waited for a storage that does not answer.

    Returns:
        The values; of no file if all were left out.

    Raises:
        UserError: no value could be read.
    """
    count = len(manifest.readable)
    rows = np.sort(generator(seed, Purpose.MEASURE).permutation(count)[:files])
    threads = default_workers(16)
    source = SampleSource(manifest, settings, seed, SkippedFiles(os.devnull), sandboxes=threads, timeout=timeout)
    bands = [BandStats() for _ in range(settings.channels)]
    read = shallow = 0
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="pera-measure") as pool,
        closing(source),  # before the pool, whose threads may wait for the storage
        progress_bar("measuring bands", len(rows), wanted=progress) as advance,
    ):
        for raster in pool.map(source.raster, map(int, rows)):
            advance(1)
            if raster is None:
                continue
            if only_deep and raster.bands.dtype in (np.uint8, np.bool_):
                shallow += 1
                continue
            read += 1
            _count(raster, pixels, bands)
    if shallow and not read:
        return BandSample([], 0)
    for number, band in enumerate(bands, 1):
        if not band.count:
            raise UserError(
                f"data {manifest.root}: channel {number} has no value in the {len(rows)} file(s) that were measured;"
                " give data.band_range=[[low,high],...]"
            )
    return BandSample(bands, read)


def _count(raster: Raster, pixels: int, bands: list[BandStats]) -> None:
    """Adds the values of each band on a grid of about so many pixels, those with data."""
    step = max(1, int(np.sqrt(raster.bands[0].size / pixels)))
    grid = (slice(step // 2, None, step), slice(step // 2, None, step))
    for channel, band in enumerate(bands):
        counted = raster.counted(channel)
        band.add(raster.values(channel)[grid], None if counted is None else counted[grid])
