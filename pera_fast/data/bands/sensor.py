"""Decides a data set's bit depth and the value range of each band, once for a run.

`data.depth=auto` is 16 if most readable files store more than 8 bits a value, as the index says. Ranges that nobody
gave are percentiles over a keyed sample of the files (`band_sample`). What was decided stands in the run's index,
from which all ranks take it, and in its config.yaml, from which a resumed run does.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.compute

from pera_fast.config import Config
from pera_fast.config.check import band_scale
from pera_fast.data.bands.band_sample import sample_bands
from pera_fast.data.bands.misfits import bands_left_out, dark_files, deep_files, fourth_band
from pera_fast.data.decoding.probe import ProbeSettings
from pera_fast.data.decoding.scaling import Scaling
from pera_fast.data.files.manifest import Manifest
from pera_fast.errors import UserError

pc: Any = pyarrow.compute  # made when it is imported: type checkers see none of its functions
_log = logging.getLogger("pera_fast")
_AUTO_PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class BandPlan:
    """Channels and bits of an image, and the stored values that become black and white; the same for all files.

    Attributes:
        channels: of an image.
        depth: bits of a pixel's channel, 8 or 16.
        ranges: stored (low, high) of each channel, or one for all; None: as the files' type has them.
    """

    channels: int
    depth: int
    ranges: tuple[tuple[float, float], ...] | None


def band_plan(cfg: Config, manifest: Manifest | None = None) -> BandPlan:
    """The plan of a configuration; what it leaves open is as it was decided for the manifest, else 8 bits."""
    decided = {} if manifest is None else manifest.decided
    depth = decided.get("depth", "8") if cfg.data.depth == "auto" else cfg.data.depth
    ranges = decided.get("band_range") if cfg.data.band_range is None else cfg.data.band_range
    pairs = None if ranges is None else tuple((low, high) for low, high in ranges)
    return BandPlan(cfg.model.in_chans, int(depth), pairs)


def adopt(cfg: Config, manifest: Manifest) -> Config:
    """The configuration with the plan for its data written in, as config.yaml and checkpoints keep it."""
    plan = band_plan(cfg, manifest)
    ranges = None if plan.ranges is None else [list(pair) for pair in plan.ranges]
    return cfg.with_values({"data.depth": str(plan.depth), "data.band_range": ranges})


def probe_settings(cfg: Config, plan: BandPlan | None = None) -> ProbeSettings:
    """Settings for probing files. Without a plan, data.depth=auto counts as 8."""
    data, channels, bands = cfg.data, cfg.model.in_chans, tuple(cfg.data.bands or ())
    deep = (plan or band_plan(cfg)).depth == 16
    # For other channels and chosen bands it makes no difference: DALI does not decode these in any case.
    scaled = (deep or data.band_scale != "auto") and channels in (1, 3) and not bands
    return ProbeSettings(channels, data.max_pixels, data.verify, bands, scaled)


def scaling_of(cfg: Config, plan: BandPlan | None = None) -> Scaling:
    """Scaling from stored values to pixels; without a plan, by the configuration alone."""
    plan = plan or band_plan(cfg)
    return Scaling(depth=plan.depth, ranges=plan.ranges, keep_8_bit=cfg.data.band_scale == "auto")


def is_deep(manifest: Manifest) -> bool:
    """Whether most readable files store more than 8 bits a value."""
    return deep_files(manifest).num_rows * 2 > (pc.sum(manifest.table["ok"]).as_py() or 0)


def mixed_scales(manifest: Manifest) -> str:
    """Message about files of more than 8 bits that declare unlike scales, which are not converted; empty: none do."""
    scales = pc.value_counts(deep_files(manifest)["scale"]).to_pylist()
    counts = sorted(((row["counts"], row["values"]) for row in scales), reverse=True)
    if len(counts) < 2:
        return ""
    kinds = ", ".join(f"{scale or 'none'} in {count} file(s)" for count, scale in counts[:4])
    return (
        f"values have {len(counts)} declared scales ({kinds}), which are not converted: the same ground may come out in"
        " several brightnesses; train on files of one scale, or convert the others (gdal_translate -unscale)"
    )


def misfits(cfg: Config, manifest: Manifest) -> list[str]:
    """Messages about what a training with this configuration would refuse or warn of."""
    depth = int(cfg.data.depth) if cfg.data.depth != "auto" else 16 if is_deep(manifest) else 8
    found = (bands_left_out(cfg, manifest), *_warnings(cfg, manifest, depth))
    return [told for told in found if told]


def _warnings(cfg: Config, manifest: Manifest, depth: int) -> list[str]:
    found = (fourth_band(cfg, manifest), mixed_scales(manifest), dark_files(cfg, manifest, depth))
    return [told for told in found if told]


def measure(cfg: Config, manifest: Manifest, depth: int, progress: bool = True) -> None:
    """Writes into the manifest what was decided: the depth, and the ranges, which are measured where none are given.

    Raises:
        UserError: no file of the sample has a value that could be measured; files of many bands of which nobody chose.
    """
    if told := bands_left_out(cfg, manifest):
        raise UserError(f"data {manifest.root}: {told}")
    for told in _warnings(cfg, manifest, depth):
        _log.warning("data %s: %s", manifest.root, told)
    scale, ranges = band_scale(cfg), cfg.data.band_range
    if ranges is None:
        if isinstance(scale, (int, float)):
            ranges = [[0.0, scale]]
        elif scale is not None or depth == 16:
            only_deep = scale is None  # auto: 8-bit files keep their range
            settings = probe_settings(cfg, replace(band_plan(cfg), depth=depth))
            wait = cfg.data.storage_timeout
            sample = sample_bands(
                manifest, settings, cfg.train.seed, only_deep=only_deep, progress=progress, timeout=wait
            )
            ranges = sample.ranges(*(scale or _AUTO_PERCENTILES)) if sample.files else None
    manifest.decided = {"depth": str(depth), "band_range": ranges}


def describe(cfg: Config) -> str:
    """One line for the log; empty where DALI decodes 8-bit images as ever."""
    if probe_settings(cfg).encoded:
        return ""
    ranges = cfg.data.band_range
    if ranges is None:
        told = "values as their type has them"
    else:
        pairs = [f"[{low:.6g}, {high:.6g}]" for low, high in ranges]
        told = f"{cfg.data.band_scale} scale " + ", ".join(pairs[:8]) + (" ..." if len(pairs) > 8 else "")
    return f"{cfg.model.in_chans} band(s) at {cfg.data.depth} bits; {told}"
