"""Measures how far crops change when JPEG files are decoded at a part of their size.

    python bench/reduced_decoding.py --scenes FOLDER --sizes 1536 2048 3072 --images 4

Large images are put together of real ones at their own resolution, so they are as sharp as images get. Each sample's
crops are made from the full decode and from the smaller one, of the same windows: those that fall on whole pixels of
the smaller image. Peak signal to noise ratio in dB, mean absolute difference of 255.
"""

import argparse
import io
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pera_fast.config import load_config
from pera_fast.data.decoding.dali import DaliDecoder
from pera_fast.data.loading.host_crops import HostCropper
from pera_fast.data.reading.reduced import FACTORS, decode_reduced
from pera_fast.data.sampling.views import draw_windows

QUALITY = 90
RANGES = (1, 1.25, 1.5, 2)  # of the windows' sides in the smaller image, over the crops' sides


def put_together(sources: list[Path], side: int, rng: np.random.Generator) -> bytes:
    """A JPEG file of side x side pixels."""
    whole = Image.new("RGB", (side, side))
    with Image.open(sources[0]) as first:
        width, height = first.size
    for top in range(0, side, height):
        for left in range(0, side, width):
            with Image.open(sources[rng.integers(len(sources))]) as file:
                whole.paste(file.convert("RGB").resize((width, height)), (left, top))
    buffer = io.BytesIO()
    whole.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def compare(sources: list[Path], recipe: str, sizes: list[int], images: int, epochs: int) -> dict[tuple, list]:
    """(range's number, group) -> (mean square, mean absolute) difference of each crop."""
    views, rng, found = load_config(recipe).views, np.random.default_rng(0), defaultdict(list)
    sides = [views.global_size] * views.num_global + [views.local_size] * views.num_local
    cropper, dali = HostCropper(1), DaliDecoder(3, 1)

    def crops(image: np.ndarray, start: np.ndarray, end: np.ndarray) -> list[np.ndarray]:
        out = [torch.empty((1, 1, side, side, 3), dtype=torch.uint8) for side in sides]
        cropper([image], start, end, out)
        return [crop[0].numpy().astype(float) for crop in out]

    for size in sizes:
        for sample in range(images):
            data = put_together(sources, size, rng)
            full = dali.decode(data)
            small = {factor: decode_reduced(data, size, size, factor, 3).pixels for factor in FACTORS}
            for epoch in range(epochs):
                windows = draw_windows(views, 0, epoch, np.array([sample]), np.array([[size, size]]))
                room = (np.minimum(windows.height, windows.width)[:, 0] / sides).min()
                for factor in FACTORS:
                    if room < factor:
                        continue
                    start, end = (np.round(corner / factor) for corner in windows.roi())
                    pairs = zip(
                        crops(full, start * factor, end * factor), crops(small[factor], start, end), strict=True
                    )
                    number = int(np.searchsorted(RANGES, room / factor, "right"))
                    for crop, (one, other) in enumerate(pairs):
                        group = "global" if crop < views.num_global else "local"
                        found[number, group].append((np.mean((one - other) ** 2), np.abs(one - other).mean()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, required=True, help="folder of images of one size")
    parser.add_argument("--recipe", default="vit_b16")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1536, 2048, 3072], help="pixels a side")
    parser.add_argument("--images", type=int, default=4, help="of each size")
    parser.add_argument("--epochs", type=int, default=4, help="draws of windows of each image")
    args = parser.parse_args()
    sources = sorted(path for path in args.scenes.rglob("*") if path.is_file())
    found = compare(sources, args.recipe, args.sizes, args.images, args.epochs)
    for (number, group), values in sorted(found.items()):
        square, absolute = np.mean(values, axis=0)
        told = " to ".join(str(value) for value in RANGES[number - 1 : number + 1])
        psnr = 10 * np.log10(255**2 / square)
        print(f"windows {told} times the crop, {group}: {psnr:.1f} dB, {absolute:.2f} ({len(values)} crops)")


if __name__ == "__main__":
    main()
