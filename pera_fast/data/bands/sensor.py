"""What a data set's values are: how many bits, which range of each band. Decided once for a run, for all its files.

`data.depth=auto` is 16 if most readable files store more than 8 bits a value, as the index says. Ranges that nobody
gave are percentiles over a keyed sample of the files (`band_sample`). What was decided stands in the run's index,
from which all ranks take it, and in its config.yaml, from which a resumed run does.
"""

import logging
from typing import Any

import pyarrow as pa
import pyarrow.compute

from pera_fast.config.check import band_scale
from pera_fast.data.bands.band_sample import sample_bands
from pera_fast.data.decoding.probe import ProbeSettings
from pera_fast.data.decoding.scaling import Scaling
from pera_fast.data.files.manifest import Manifest

pc: Any = pyarrow.compute  # made when it is imported: type checkers see none of its functions
_log = logging.getLogger("pera_fast")
_SHALLOW = ("", "bool", "uint8", "int8")  # empty: not known
_AUTO_PERCENTILES = (0.5, 99.5)


def probe_settings(cfg: Any) -> ProbeSettings:
    """How files will be used. While data.depth is auto, as if it were 8."""
    data, channels, bands = cfg.data, cfg.model.in_chans, tuple(cfg.data.bands or ())
    # For other channels and chosen bands it makes no difference: DALI does not decode these in any case.
    scaled = (data.depth == "16" or data.band_scale != "auto") and channels in (1, 3) and not bands
    return ProbeSettings(channels, data.max_pixels, data.verify, bands, scaled)


def scaling_of(cfg: Any) -> Scaling:
    """How stored values become pixels."""
    ranges = cfg.data.band_range
    return Scaling(
        depth=16 if cfg.data.depth == "16" else 8,
        ranges=None if ranges is None else tuple((low, high) for low, high in ranges),
        keep_8_bit=cfg.data.band_scale == "auto",
    )


def is_deep(manifest: Manifest) -> bool:
    """Whether most readable files store more than 8 bits a value."""
    table = manifest.table
    shallow = pc.is_in(table["dtype"], value_set=pa.array(_SHALLOW))
    readable = pc.sum(table["ok"]).as_py() or 0
    deep = pc.sum(pc.and_(table["ok"], pc.invert(shallow))).as_py() or 0
    return deep * 2 > readable


def measure(cfg: Any, manifest: Manifest, progress: bool = True) -> None:
    """Puts what data.band_range comes to into `cfg`, and that and data.depth, which is decided, into the manifest.

    Raises:
        UserError: no file of the sample has a value that could be measured.
    """
    scale = band_scale(cfg)
    if cfg.data.band_range is None:
        if isinstance(scale, (int, float)):
            cfg.data.band_range = [[0.0, scale]]
        elif scale is not None or cfg.data.depth == "16":
            only_deep = scale is None  # auto: 8-bit files keep their range
            sample = sample_bands(manifest, probe_settings(cfg), cfg.train.seed, only_deep=only_deep, progress=progress)
            cfg.data.band_range = sample.ranges(*(scale or _AUTO_PERCENTILES)) if sample.files else None
    manifest.decided = {"depth": cfg.data.depth, "band_range": cfg.data.band_range}


def adopt(cfg: Any, manifest: Manifest) -> None:
    """Puts what was decided for the run's index into `cfg`, unless that has it already."""
    decided = manifest.decided
    if cfg.data.depth == "auto":
        cfg.data.depth = decided.get("depth", "8")
    if cfg.data.band_range is None:
        cfg.data.band_range = decided.get("band_range")


def describe(cfg: Any) -> str:
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
