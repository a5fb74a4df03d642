"""Names that the files of a data set give to their bands."""

import warnings
from collections.abc import Sequence

from pera_fast.data.decoding.probe import read_file
from pera_fast.data.files.manifest import Manifest
from pera_fast.data.files.shards import locate


def band_descriptions(manifest: Manifest, bands: Sequence[str]) -> list[str]:
    """The descriptions of some bands, as the first and the last file have them; "" where they have none or differ.

    Args:
        manifest: the data set.
        bands: numbers from 1, or names; a name stays what it is.
    """
    first, last = (_of_file(manifest, row) for row in (0, len(manifest.readable) - 1))
    shared = [one if one == other else "" for one, other in zip(first, last, strict=False)]
    return [band if not band.isdigit() else shared[int(band) - 1] if int(band) <= len(shared) else "" for band in bands]


def _of_file(manifest: Manifest, row: int) -> list[str]:
    """Description of each band of a file; none where the file cannot tell."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    files = manifest.readable
    path = locate(str(manifest.root), files.paths[row].as_py(), int(files.offset[row]), int(files.size[row]))
    try:
        with warnings.catch_warnings(), rasterio.MemoryFile(read_file(path)[0]) as memory:
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with memory.open() as scene:
                return [" ".join((text or "").split()) for text in scene.descriptions]
    except (RasterioError, OSError):
        return []
