"""The table of embeddings: a row for each image, and what the vectors are, as metadata of the Parquet file.

| column | type | |
| --- | --- | --- |
| path | string | relative to the folder; of a shard's member SHARD.tar/MEMBER |
| lon, lat | double | degrees of the centre, EPSG:4326; null where the file has no place |
| crs | string | of the bounds: EPSG:CODE, or WKT |
| bounds | fixed_size_list<double>[4] | left, bottom, right, top |
| vector | fixed_size_list<float16>[D] | as the network gave it, not normalised |
| patches | fixed_shape_tensor<float16>[L, D] | if asked for: features of the patches in raster order |
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pera_fast.data.tools.file_places import FilePlace
from pera_fast.weights.backbone import Backbone

METADATA = b"pera_fast"
VERSION = 1


@dataclass(frozen=True)
class About:
    """Facts about a table of embeddings, which stand in its metadata.

    Attributes:
        root: the folder of the images, absolute.
        weights: what `--weights` named; a path is absolute.
        heads: attention heads that were given for the weights.
        digest: SHA-256 of the backbone's parameters.
        pooling: cls, mean, or both: cls, then mean.
        width: length of a vector.
        size: pixels a side that images were resized to.
        patch_size: pixels a side of a patch.
        patches: whether there is a column of patch features.
        precision: of activations and matrix products.
        channels, bands, rgb_bands, depth, band_scale, band_range: how images are read, as keys of a configuration.
        mean, std: of each channel, of values in [0, 1].
        batch_size: images at a time.
        version: of this form.
    """

    root: str
    weights: str
    heads: int | None
    digest: str
    pooling: str
    width: int
    size: int
    patch_size: int
    patches: bool
    precision: str
    channels: int
    bands: list[int | str] | None
    rgb_bands: list[int | str] | None
    depth: str
    band_scale: str
    band_range: list[list[float]] | None
    mean: list[float]
    std: list[float]
    batch_size: int
    version: int = VERSION

    @property
    def positions(self) -> int:
        """Patches L of an image."""
        return (self.size // self.patch_size) ** 2

    @property
    def patch_width(self) -> int:
        """Length of a patch's feature."""
        return self.width // 2 if self.pooling == "both" else self.width

    @property
    def row_bytes(self) -> int:
        """Bytes of an image's features."""
        return 2 * (self.width + (self.positions * self.patch_width if self.patches else 0))


def schema(about: About) -> pa.Schema:
    """Columns of a table, with its metadata."""
    columns: list[Any] = [
        pa.field("path", pa.string(), nullable=False),
        pa.field("lon", pa.float64()),
        pa.field("lat", pa.float64()),
        pa.field("crs", pa.string()),
        pa.field("bounds", pa.list_(pa.float64(), 4)),
        pa.field("vector", _vector(about.width), nullable=False),
    ]
    if about.patches:
        shape = about.positions, about.patch_width
        columns.append(pa.field("patches", pa.fixed_shape_tensor(pa.float16(), shape), nullable=False))
    return pa.schema(columns).with_metadata({METADATA: json.dumps(asdict(about)).encode()})


def _vector(width: int) -> pa.DataType:
    return pa.list_(pa.field("element", pa.float16(), nullable=False), width)


def rows(
    about: About,
    paths: Sequence[str],
    places: Sequence[FilePlace | None],
    vectors: np.ndarray,
    patches: np.ndarray | None,
) -> pa.Table:
    """Rows of a table.

    Args:
        about: what they are.
        paths: of N images.
        places: of each, or None.
        vectors: float16 [N, width].
        patches: float16 [N, L, D], if there is such a column.
    """
    wanted = schema(about)
    columns: dict[str, Any] = {
        "path": paths,
        "lon": [place and place.lon for place in places],
        "lat": [place and place.lat for place in places],
        "crs": [(place and place.crs) or None for place in places],
        "bounds": [place and place.bounds for place in places],
    }
    arrays = [pa.array(values, wanted.field(name).type) for name, values in columns.items()]
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=_vector(about.width)))
    if patches is not None:
        arrays.append(pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(patches)))
    return pa.table(arrays, schema=wanted)


def vectors_of(table: pa.Table) -> np.ndarray:
    """float16 [N, width] of a table's rows."""
    column = table["vector"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def patches_of(table: pa.Table) -> np.ndarray:
    """float16 [N, L, D] of a table's rows, if they have the column."""
    return table["patches"].combine_chunks().to_numpy_ndarray()


def weights_digest(backbone: Backbone) -> str:
    """SHA-256 of a backbone's parameters."""
    digest = hashlib.sha256()
    for name, value in sorted(backbone.model.state_dict().items()):
        digest.update(f"{name} {list(value.shape)}".encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
