"""Finds files whose bands or depth the configuration would not read as their owner expects."""

import re
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute

from pera_fast.config import Config
from pera_fast.data.files.band_files import PATTERN, is_quality, scenes_of
from pera_fast.data.files.manifest import Manifest

pc: Any = pyarrow.compute  # made when it is imported: type checkers see none of its functions
_ALPHA = 4  # bands of a picture with alpha; files with more are no pictures
_LOOKED_AT = 4096  # files, for names of bands
SHALLOW = ("", "bool", "uint8", "int8")  # types of at most 8 bits; empty: not known


def deep_files(manifest: Manifest) -> pa.Table:
    """Rows of the readable files that store more than 8 bits a value."""
    shallow = pc.is_in(manifest.table["dtype"], value_set=pa.array(SHALLOW))
    return manifest.table.filter(pc.and_(manifest.table["ok"], pc.invert(shallow)))


def bands_left_out(cfg: Config, manifest: Manifest) -> str:
    """Message about files of a sensor's bands of which nobody chose some; empty: there are none.

    Files of other numbers of bands than three become colour or gray, which takes the first three or the first: right
    for pictures with alpha, never meant for a sensor's bands.
    """
    if cfg.data.bands or cfg.model.in_chans not in (1, 3):
        return ""
    stored = _count(manifest.table["channels"].filter(manifest.table["ok"]))
    deep = _count(deep_files(manifest)["channels"])
    many = {bands: count for bands, count in stored.items() if bands > _ALPHA}
    if 2 in deep:  # a gray picture with alpha has 8 bits
        many[2] = deep[2]
    if not many:
        return ""
    files, least = sum(many.values()), min(many)
    have = f"{least} bands" if len(many) == 1 else f"{least} to {max(many)} bands"
    taken = "the first 3 as a colour picture" if least > 2 else "the first"
    every = f"for all of them give model.in_chans={least}, for" if stored.keys() == {least} else "for"
    some = "[3,2,1]" if least > 2 else "[1]"
    return (
        f"{files} of {sum(stored.values())} file(s) have {have}, and model.in_chans={cfg.model.in_chans} would take"
        f" {taken}; {every} some data.bands={some} with model.in_chans to match (numbers or names)"
    )


def refused(cfg: Config, manifest: Manifest) -> Manifest:
    """The manifest with the files that `bands_left_out` counts as unreadable ones, each with its reason."""
    if not bands_left_out(cfg, manifest):
        return manifest
    table, bands = manifest.table, manifest.table["channels"]
    shallow = pc.is_in(table["dtype"], value_set=pa.array(SHALLOW))
    many = pc.or_(pc.greater(bands, _ALPHA), pc.and_(pc.equal(bands, 2), pc.invert(shallow)))
    many = pc.and_(table["ok"], many)
    told = pc.binary_join_element_wise("has", bands.cast(pa.string()), f"bands, not {cfg.model.in_chans}", " ")
    changed = {"ok": pc.and_(table["ok"], pc.invert(many)), "reason": pc.if_else(many, told, table["reason"])}
    for name, column in changed.items():
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    return replace(manifest, table=table)


def single_bands(cfg: Config, manifest: Manifest) -> str:
    """Message about files that are each one band of a scene, as their names say; empty: they are not.

    As colour pictures each would be gray, and a crop would never see two bands of one place.
    """
    if cfg.data.bands or cfg.model.in_chans != 3:
        return ""
    table = manifest.table.select(["path", "channels", "ok"]).slice(0, _LOOKED_AT)
    table = table.filter(table["ok"])
    images = sum(not is_quality(path) for path in table["path"].to_pylist())
    single = table.filter(pc.equal(table["channels"], 1))["path"].to_pylist()
    scenes, others = scenes_of(single, re.compile(PATTERN))
    several = {scene: bands for scene, bands in scenes.items() if len(bands) > 1}
    alone = len(scenes) - len(several)
    if not several or 2 * (len(single) - len(others) - alone) <= images:  # a band in three resolutions is three files
        return ""
    scene, bands = next(iter(several.items()))
    return (
        f"its files are single bands ({', '.join(list(bands)[:4])}, ... of {scene}), and each would be a gray picture:"
        f" stack them first, pera-fast data stack {manifest.root} --out STACKED; or give model.in_chans=1"
    )


def fourth_band(cfg: Config, manifest: Manifest) -> str:
    """Message about the files of four bands and more than 8 bits, whose fourth is no alpha; empty: there are none."""
    if cfg.data.bands or cfg.model.in_chans not in (1, 3):
        return ""
    files = _count(deep_files(manifest)["channels"]).get(_ALPHA, 0)
    if not files:
        return ""
    return (
        f"{files} file(s) have 4 bands, of which the first 3 are taken for red, green and blue: if they lie otherwise"
        " (blue first, as of many satellites), give data.bands=[3,2,1]; for all of them model.in_chans=4"
    )


def _count(values: pa.ChunkedArray) -> dict[int, int]:
    return {row["values"]: row["counts"] for row in pc.value_counts(values).to_pylist()}


def dark_files(cfg: Config, manifest: Manifest, depth: int) -> str:
    """Message about the files of 16 bits in a data set that is read at 8; empty: nothing would come out dark."""
    if depth != 8 or cfg.data.band_scale != "auto" or cfg.data.band_range is not None:
        return ""
    wide = deep_files(manifest)
    wide = wide.filter(pc.equal(wide["dtype"], "uint16"))
    if not wide.num_rows:
        return ""
    files = pc.sum(manifest.table["ok"]).as_py()
    return (
        f"{wide.num_rows} of {files} file(s) store 16 bits a value ({wide['path'][0].as_py()}) and are read at 8 bits,"
        " where 65535 is white: values of sensors come out nearly black; with data.depth=16 they are scaled by their"
        " measured range, and the files of 8 bits stay as they are"
    )
