"""Targets: image files and members of tars, through every decoder as index and training use them."""

import struct
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
from data_support import encoded, raster, scene, small_config
from PIL import Image
from tar_support import write_tar

from fuzz.mutations import mutate, seeds
from fuzz.target import Target, expect
from pera_fast.data.decoding import decode
from pera_fast.data.decoding.dali import DaliDecoder
from pera_fast.data.decoding.probe import ProbeResult, ProbeSettings
from pera_fast.data.decoding.sandbox import Sandbox
from pera_fast.data.decoding.scaling import Scaling
from pera_fast.data.decoding.tar import list_members
from pera_fast.data.files.shards import locate
from pera_fast.data.reading.reduced import ReducedDecoder

_PIXELS = 2**22  # data.max_pixels
_BATCH = 16  # files of a case
_SETTINGS = (
    ProbeSettings(3, _PIXELS), ProbeSettings(1, _PIXELS), ProbeSettings(3, _PIXELS, scaled=True),
    ProbeSettings(2, _PIXELS, bands=(3, 1)), ProbeSettings(3, _PIXELS, verify=False),
)  # fmt: skip
_DECODERS = (None, None, ("dali",), ("pillow",), ("rasterio",))


def originals() -> dict[str, bytes]:
    """Valid files: those of `seeds`, and one of every other format and kind of pixels."""
    picture = Image.fromarray(scene(1, 40, 56))
    planes = np.moveaxis(scene(2, 40, 56), -1, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = planes.astype(np.uint16) * 257
    return (
        seeds()
        | {
            "large.jpg": encoded(Image.fromarray(scene(4, 400, 360)), "JPEG", quality=70),  # reduced decodes
            "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG"),
            "turned.jpg": encoded(picture, "JPEG", exif=exif),
            "alpha.png": encoded(picture.convert("RGBA"), "PNG"),
            "interlaced.png": encoded(picture.convert("1"), "PNG"),
            "lossy.webp": encoded(picture, "WEBP"),
            "lossless.webp": encoded(picture, "WEBP", lossless=True),
            "plain.bmp": encoded(picture, "BMP"),
            "palette.bmp": encoded(picture.convert("P"), "BMP"),
            "first.gif": encoded(picture.convert("P"), "GIF"),
            "plain.ppm": encoded(picture, "PPM"),
            "deep.pgm": b"P5\n40 40\n65535\n" + deep[0, :, :40].byteswap().tobytes(),
            "lossy.jp2": encoded(picture, "JPEG2000", irreversible=True, quality_layers=[20]),
            "lossless.jp2": encoded(picture, "JPEG2000"),
            "bare.j2k": encoded(picture, "JPEG2000", no_jp2=True),
            "nodata.tif": raster(planes.astype(np.int16) - 100, nodata=-100),
            "masked.tif": raster(planes, nodata=7),
            "jpeg.tif": raster(planes, compress="jpeg", photometric="ycbcr"),
            "big.tif": raster(deep, BIGTIFF="YES", predictor=2, compress="lzw"),
            "half.tif": raster((planes / 255).astype(np.float32), compress="zstd", predictor=3),
            "palette.tif": encoded(picture.convert("P"), "TIFF"),
            "bits.tif": encoded(picture.convert("1"), "TIFF", compression="group4"),
        }
    )


class Images(Target):
    name = "images"
    covers = "JPEG, PNG, TIFF, BigTIFF, WebP, BMP, GIF, PNM, JPEG 2000 by DALI, Pillow, rasterio; reduced decodes"

    def __init__(self, folder):
        super().__init__(folder)
        self._originals = list(originals().items())
        self._sandbox = Sandbox(timeout=20)
        self._dali = {channels: DaliDecoder(channels, 1) for channels in (1, 3)}
        views = small_config().views
        self._reduced = {channels: ReducedDecoder(views, 0, channels, 1.25) for channels in (1, 3)}

    def workers(self):
        process = self._sandbox._worker.process
        return [] if process is None else [process.pid]

    def run(self, rng):
        settings = _SETTINGS[int(rng.integers(len(_SETTINGS)))]
        decoders = _DECODERS[int(rng.integers(len(_DECODERS)))]
        if not set(decoders or ()) <= set(settings.decoders):
            decoders = None
        files = self.files(rng)
        results = self._sandbox.probe([path for path, _ in files], settings, decoders)
        expect(len(results) == len(files), "results are missing")
        counts: Counter[str] = Counter()
        for (path, data), result in zip(files, results, strict=True):
            told = f"{path}: {result}"
            expect(result.ok != bool(result.reason), f"neither ok nor refused with a reason: {told}")
            expect("\n" not in result.reason and len(result.reason) < 2000, f"no one line: {told}")
            expect("did not finish" not in result.reason, f"hung: {told}")
            expect(not result.fault, f"taken for a fault of the storage: {told}")
            counts[result.decoder or ("killed" if "killed by" in result.reason else "refused")] += 1
            if result.ok and result.decoder:
                self._use(data, result, replace(settings, verify=True), told)
        return " ".join(word for kind, count in counts.items() for word in [kind] * count)

    def files(self, rng):
        """(path or member, bytes) of the files of a case."""
        made = []
        for number in range(_BATCH):
            name, data = self._originals[int(rng.integers(len(self._originals)))]
            path, data = self.case / f"{number:02d}-{name}", mutate(data, rng, 2 if number % 2 else 5)
            path.write_bytes(data)
            made.append((str(path), data))
        return made

    def _use(self, data: bytes, result: ProbeResult, settings: ProbeSettings, told: str):
        """What passed the check is decoded in the training process, twice: no error, that size, the same pixels."""
        if result.format == "png":
            expect(not _broken_chunk(data), f"a PNG whose checksum is wrong was decoded: {told}")
        if result.decoder == "dali":
            images = [self._dali[settings.channels].decode(data) for _ in range(2)]
            self._reduced[settings.channels](data, 0, 0, result.height, result.width)
        else:
            scaling = Scaling()
            images = [scaling(decode.read(data, result.decoder, settings.channels, settings.bands)) for _ in range(2)]
        shape = (result.height, result.width, settings.channels)
        expect(images[0].shape == shape, f"decoded to {images[0].shape}: {told}")
        expect(np.array_equal(*images), f"decodes to other pixels each time: {told}")


class Members(Images):
    name = "members"
    covers = "the same as members of a tar, found by its headers"

    def files(self, rng):
        found = {name: data for path, data in super().files(rng) for name in [path.rsplit("/", 1)[1]]}
        for path in self.case.iterdir():
            path.unlink()
        tar = write_tar(self.case / "shard.tar", found)
        places = {member.name: member for member in list_members(str(tar))}
        return [
            (locate(str(self.case), f"shard.tar/{name}", places[name].offset, places[name].size), data)
            for name, data in found.items()
        ]


def _broken_chunk(data: bytes) -> bool:
    """Whether a chunk of a PNG's pixels, up to its end mark, has another checksum than it says."""
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 8 + length
        if end + 4 > len(data):
            return False
        if kind == b"IEND":
            return False
        if (
            kind in (b"IHDR", b"PLTE", b"IDAT")
            and zlib.crc32(data[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]
        ):
            return True
        at = end + 4
    return False
