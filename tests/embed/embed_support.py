"""A small folder of images and the vectors that its embeddings must hold."""

from pathlib import Path

import numpy as np
import torch
from data_support import raster, scene, write_scenes
from rasterio.transform import from_origin

from pera_fast.embed.run import embed
from pera_fast.features.extract import Extractor, pool
from pera_fast.weights.load import load_backbone

WEIGHTS, SIZE = "random:tiny", 16
PLACES = {"geo/a.tif": (500000, "EPSG:32631"), "geo/b.tif": (700000, "EPSG:32631"), "geo/c.tif": (500000, "EPSG:32618")}


def images(folder: Path) -> list[str]:
    """Seven pictures, three GeoTIFFs and a file that is none; returns the paths of the images, sorted."""
    write_scenes(folder / "plain", 7)
    (folder / "geo").mkdir()
    for number, (name, (east, crs)) in enumerate(PLACES.items()):
        pixels = np.moveaxis(scene(20 + number, 40, 40), -1, 0)
        place = {"crs": crs, "transform": from_origin(east, 5_761_000, 10, 10)}
        (folder / name).write_bytes(raster(pixels, **place))
    (folder / "plain" / "broken.jpg").write_bytes(b"not the pixels you are looking for")
    return sorted([*PLACES, *(f"plain/{number:03d}.png" for number in range(7))])


def run(folder, out, weights=WEIGHTS, **options):
    """`embed` with small images and batches."""
    return embed(folder, weights, out, **{"size": SIZE, "batch_size": 4, "progress": False, **options})


def expected(folder: Path, paths: list[str], pooling: str = "cls", weights=WEIGHTS, size: int = SIZE) -> np.ndarray:
    """float16 [N, D], as evaluations have them."""
    extractor = Extractor(load_backbone(weights), torch.device("cpu"), size)
    return pool(extractor.pooled([folder / path for path in paths], progress=False), pooling).half().numpy()


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for pixels that decoders round differently and for float16."""
    return a.dtype == b.dtype == np.float16 and a.shape == b.shape and np.abs(a.astype(float) - b).max() < 0.02
