"""Compare `pera-fast embed` with the bare forward pass of the same network on images that are decoded already.

python bench/embed_speed.py IMAGES --weights random:tiny [--size N] [--count N] [--rounds 3]

Both sides take turns in one process. Printed are images per second by the clock, and milliseconds of all cores for an
image by the processor: on a machine that does something else too, the clock says little. Index and start do not count.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index.build import index_for
from pera_fast.data.loading.whole import WholeImages
from pera_fast.embed.parts import Parts
from pera_fast.embed.run import new_about, reading
from pera_fast.embed.writer import Writer
from pera_fast.features.extract import Extractor, choose_device
from pera_fast.weights.load import load_backbone


def main() -> None:
    """Print one line of JSON for each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--size", type=int)
    parser.add_argument("--count", type=int, help="the first files only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    given = parser.parse_args()
    backbone = load_backbone(given.weights)
    extractor = Extractor(backbone, choose_device(), given.size, batch_size=given.batch_size)
    cfg = reading(backbone.cfg)
    manifest = index_for(given.images, cfg)
    if given.count is not None:
        manifest.table = manifest.table.slice(0, given.count)
    count = len(manifest.readable)
    about = new_about(given.images.absolute(), given.weights, None, extractor, "cls", False)
    with tempfile.TemporaryDirectory() as folder:
        skipped = SkippedFiles(Path(folder) / "skipped.csv")
        images = WholeImages(
            cfg, manifest, size=extractor.size, batch_size=given.batch_size, device=extractor.device, skipped=skipped
        )
        ready = [batch.pixels for batch in images.batches()]

        def forward() -> None:
            for pixels in ready:
                extractor.tokens(pixels)[0][0].half().cpu()

        def embedded() -> None:
            with Parts(Path(folder) / "out.parquet") as parts:
                parts.begin(about, manifest)
                Writer(cfg, manifest, extractor, about, parts, skipped).run(progress=False)
                parts.finish(about)

        found: dict[str, list[tuple[float, float]]] = {"forward": [], "embed": []}
        forward()
        for _ in range(given.rounds):
            found["forward"].append(_timed(forward))
            found["embed"].append(_timed(embedded))
    for side, times in found.items():
        wall, processor = (statistics.median(values) for values in zip(*times, strict=True))
        rates = {"images_per_s": count / wall, "processor_ms": 1000 * processor / count}
        about_side = {"side": side, "weights": given.weights, "size": extractor.size, "images": count}
        print(json.dumps({**about_side, "threads": torch.get_num_threads(), **rates}))


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


if __name__ == "__main__":
    main()
