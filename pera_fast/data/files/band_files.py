"""Groups files of one band by the scene that they belong to, from their names (Sentinel-2, Landsat and the like)."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

# The band in a file's name: B02_10m, B8A, SR_B4, between separators. Landsat's SR_B4 and ST_B10 are of one scene.
PATTERN = r"(?:^|[_.-])(?:S[RT]_)?(?P<band>B\d{1,2}A?)(?:_(?P<metres>\d+)m)?(?=$|[_.-])"
_QUALITY_FOLDER, _QUALITY = "QI_DATA", "MSK_"  # of Sentinel-2: masks of each band, named as a band is
_RESOLUTION_FOLDER = re.compile(r"R\d+m")  # IMG_DATA/R10m of Sentinel-2 L2A


@dataclass(frozen=True)
class BandFile:
    """A file of one band."""

    path: str  # relative
    scene: str  # the path without what names the band
    band: str
    metres: float  # a pixel, as the name says; infinite: it does not


def is_quality(path: str) -> bool:
    """Whether a file tells the quality of bands, as Sentinel-2's masks do."""
    *folders, name = path.split("/")
    return _QUALITY_FOLDER in folders or name.startswith(_QUALITY)


def band_file(path: str, pattern: re.Pattern[str]) -> BandFile | None:
    """A file as its name describes it; None if it names no band.

    Args:
        path: relative, with slashes.
        pattern: has a group `band`, and perhaps `metres`; it is searched in the name without suffix.
    """
    *folders, name = path.split("/")
    stem = name.rpartition(".")[0] or name
    if is_quality(path):
        return None
    matches = list(pattern.finditer(stem))
    if not matches:
        return None
    found = matches[-1]  # dates and tiles come first
    groups = found.groupdict()
    rest = (stem[: found.start()] + stem[found.end() :]).strip("_.-")
    kept = [folder for folder in folders if not _RESOLUTION_FOLDER.fullmatch(folder)]
    metres = float(groups["metres"]) if groups.get("metres") else float("inf")
    return BandFile(path, "/".join([*kept, rest or "scene"]), groups["band"], metres)


def scenes_of(paths: Iterable[str], pattern: re.Pattern[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """{scene: {band: path}}, bands in their order, and the files that name none.

    Of a band that lies in several resolutions the finest is taken.
    """
    scenes: dict[str, dict[str, BandFile]] = {}
    others = []
    for path in sorted(paths):
        file = band_file(path, pattern)
        if file is None:
            others.append(path)
            continue
        bands = scenes.setdefault(file.scene, {})
        if file.band not in bands or file.metres < bands[file.band].metres:
            bands[file.band] = file
    ordered = {scene: {band: bands[band].path for band in sorted(bands, key=_order)} for scene, bands in scenes.items()}
    return ordered, others


def _order(band: str) -> tuple[int, str]:
    """B1, B2, ..., B8, B8A, B9: by number, then by letter."""
    number = re.search(r"\d+", band)
    return (int(number[0]) if number else -1, band)
