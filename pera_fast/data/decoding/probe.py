"""Checks whether a file can be decoded, and by which decoder. Runs in a `sandbox`: a decoder may die or hang."""

import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from pera_fast.data.decoding import decode, png
from pera_fast.data.decoding.band_numbers import Bands
from pera_fast.data.decoding.dali import DaliDecoder, complaints, error_reason
from pera_fast.data.decoding.declared import declared
from pera_fast.data.decoding.formats import HEAD_BYTES, sniff
from pera_fast.data.decoding.scaling import Raster
from pera_fast.data.decoding.tar import FileState, Member, read_member
from pera_fast.storage import is_passing

MAX_FILES = 64  # of one call
MAX_BYTES = 2**31  # of one file; it is read as a whole
VRT_REASON = (
    "VRT: refers to other files, which are not read through it; cut it into tiles: pera-fast data tile FILE.vrt"
)
_BATCH_PIXELS = 2**24  # decoded together
_HEAD = 2**16  # bytes in which a header is looked for first

_MEMORY_NAMES = re.compile(r"'?(/vsimem/)?[0-9a-f]{8}-[0-9a-f-]{27}[^\s:']*'?:?\s*|<_io.BytesIO object at 0x\w+>")


@dataclass(frozen=True)
class ProbeSettings:
    """Settings that decide how a file is decoded."""

    channels: int = 3  # of the decoded image
    max_pixels: int = 2**28
    verify: bool = True  # decode, not only read the header
    bands: Bands = ()  # which bands of a file; empty: all
    scaled: bool = False  # values are scaled by us and not by DALI, which keeps 8 bits

    def __post_init__(self) -> None:
        object.__setattr__(self, "bands", tuple(self.bands))  # a list where it comes from JSON

    @property
    def encoded(self) -> bool:
        """Whether files enter the pipeline as they are; else as arrays: DALI has no other images than RGB and gray."""
        return self.channels in (1, 3) and not self.bands and not self.scaled

    @property
    def decoders(self) -> tuple[str, ...]:
        """Decoders to try, in this order."""
        return ("dali", "rasterio", "pillow") if self.encoded else ("rasterio", "pillow")


@dataclass
class ProbeResult:
    """One file: a row of the manifest."""

    path: str
    ok: bool = False
    reason: str = ""  # why not
    decoder: str = ""  # what decoded it; empty if that was not tried
    format: str = ""
    width: int = 0  # upright, as decoded
    height: int = 0
    channels: int = 0  # as stored
    dtype: str = ""
    size: int = -1  # bytes; -1: could not be opened
    mtime_ns: int = 0
    offset: int = -1  # of a shard's member, bytes; -1: a file of its own
    scale: str = ""  # declared scale of the values, of each band if they differ; empty: none
    fault: int = 0  # errno of the storage or the machine: nothing was found out about the file


@dataclass
class _File:
    result: ProbeResult
    data: bytes = b""
    kind: str | None = None
    failures: list[str] = field(default_factory=list)
    doubted: tuple[int, int] | None = None  # (height, width) that DALI gave, with an error message of its own

    def accept(self, decoder: str, height: int, width: int, max_pixels: int) -> None:
        if height * width > max_pixels:
            self.refuse(height, width, max_pixels)
            return
        self.result.ok, self.result.decoder, self.result.height, self.result.width = True, decoder, height, width

    def refuse(self, height: int, width: int, max_pixels: int) -> None:
        self.result.reason = f"{width} x {height} is more than data.max_pixels={max_pixels}"

    @cached_property
    def decoders(self) -> tuple[str, ...]:
        """Decoders that give its values as they are stored."""
        return declared(self.data, self.kind).decoders

    @property
    def open(self) -> bool:
        return not self.result.ok and not self.result.reason


def read_file(path: str | Member, most: int | None = None) -> tuple[bytes, FileState]:
    """The bytes of a regular file, or of a tar's member, and its state when they were read.

    Args:
        path: the file or member.
        most: read no more than so many bytes of a file; None: all. Members are read whole.

    Raises:
        OSError: it cannot be read; also if it is no regular file, larger than MAX_BYTES or changed meanwhile.
    """
    if isinstance(path, Member):
        return read_member(path, MAX_BYTES)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # non-blocking: opening a pipe would wait for ever
    try:
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode):
            raise OSError("not a regular file")
        if state.st_size > MAX_BYTES:
            raise OSError(f"{state.st_size / 2**30:.1f} GiB are too much to read at once: cut it into tiles")
        wanted = state.st_size if most is None else min(most, state.st_size)
        data = os.read(fd, wanted)
        while len(data) < wanted and (more := os.read(fd, wanted - len(data))):
            data += more
        after = os.fstat(fd)
    finally:
        os.close(fd)
    if len(data) != wanted or (after.st_size, after.st_mtime_ns) != (state.st_size, state.st_mtime_ns):
        raise OSError("changed while it was read")
    return data, FileState(state.st_size, state.st_mtime_ns)


def os_reason(error: OSError) -> str:
    """Reason of an OSError, without the path, on one line."""
    return f"cannot read: {error.strerror or error}"


def answered(result: ProbeResult) -> ProbeResult:
    """The result, if it is one. Raises OSError where the storage or the machine kept the file from being read."""
    if result.fault:
        raise OSError(result.fault, os.strerror(result.fault))
    return result


def _note(result: ProbeResult, error: OSError) -> None:
    result.reason = os_reason(error)
    if is_passing(error):
        result.fault = error.errno or 0


class Prober:
    """Probes files in this process; it dies with the decoder. The decoders are built once and kept."""

    def __init__(self) -> None:
        self._dali: dict[int, DaliDecoder] = {}

    def __call__(
        self,
        paths: Sequence[str | Member],
        settings: ProbeSettings,
        decoders: Sequence[str],
        say: Callable[[str], None] = lambda stage: None,
    ) -> list[ProbeResult]:
        """Results in the order of `paths`; at most MAX_FILES of them. `say` is told what is tried next."""
        decode.allow_pixels(settings.max_pixels)
        files = [self._read(path, None if settings.verify else _HEAD) for path in paths]
        codec = "dali" in decoders  # one library: the header alone can kill it too
        if codec:
            say("dali")
        self._read_headers(files, settings, codec)
        if settings.verify:
            if "dali" in decoders:
                self._try_dali([file for file in files if file.open and "dali" in file.decoders], settings)
            for decoder in decoders:
                if decoder != "dali" and any(file.open for file in files):
                    say(decoder)
                    self._try_library([file for file in files if file.open], decoder, settings)
        for file in files:
            if file.open and file.doubted:
                file.accept("dali", *file.doubted, settings.max_pixels)
            if file.open:
                file.result.reason = _reason(file)
        return [file.result for file in files]

    @staticmethod
    def _read(path: str | Member, most: int | None = None) -> _File:
        result = ProbeResult(str(path))
        try:
            data, state = read_file(path, most)
        except OSError as error:
            _note(result, error)
            return _File(result)
        result.size, result.mtime_ns = state.st_size, state.st_mtime_ns
        if not data:
            result.reason = "empty file"
        kind = sniff(data[:HEAD_BYTES])
        if kind == "vrt":
            result.reason = VRT_REASON
        if kind == "png" and most is None:
            result.reason = png.damage(data)
        result.format = kind or ""
        return _File(result, data, kind)

    @staticmethod
    def _read_headers(files: list[_File], settings: ProbeSettings, codec: bool) -> None:
        for file in files:
            if not file.open:
                continue
            header = decode.read_header(file.data, file.kind, codec=codec, upright=not settings.verify)
            if header is None and len(file.data) < file.result.size:  # it stands further back
                try:
                    file.data, _ = read_file(file.result.path)
                    header = decode.read_header(file.data, file.kind, codec=codec, upright=True)
                except OSError as error:
                    if is_passing(error):
                        _note(file.result, error)
                        continue
            if header is None:
                if not settings.verify:
                    file.failures.append("no readable header")
                continue
            result = file.result
            result.width, result.height = header.width, header.height
            result.channels, result.dtype = header.channels, header.dtype
            if header.width * header.height > settings.max_pixels:
                file.refuse(header.height, header.width, settings.max_pixels)
            elif not settings.verify:
                result.ok = True

    def _try_dali(self, files: list[_File], settings: ProbeSettings) -> None:
        """A file that DALI's decoders complain of is left to the others, if they can read it.

        They would complain at each read, and may be wrong: planar TIFFs of 16 bits come out as noise (DALI 2.4).
        """
        decoder = self._dali.get(settings.channels)
        if decoder is None:
            decoder = self._dali[settings.channels] = DaliDecoder(settings.channels, MAX_FILES)
        known = [file for file in files if file.result.width]  # one bad file fails its batch: suspects come alone
        for batch in [*_batches(known), *([file] for file in files if not file.result.width)]:
            try:
                with complaints() as complained:
                    shapes = decoder.shapes([np.frombuffer(file.data, np.uint8) for file in batch])
            except Exception as error:  # the whole batch fails with one file, and not every error says which
                if len(batch) == 1:
                    batch[0].failures.append(f"DALI: {error_reason(error)}")
                else:
                    middle = len(batch) // 2
                    self._try_dali(batch[:middle], settings)
                    self._try_dali(batch[middle:], settings)
                continue
            if complained() and len(batch) > 1:
                for file in batch:
                    self._try_dali([file], settings)
                continue
            if complained():
                batch[0].doubted = shapes[0]
                continue
            for file, (height, width) in zip(batch, shapes, strict=True):
                file.accept("dali", height, width, settings.max_pixels)

    @staticmethod
    def _try_library(files: list[_File], decoder: str, settings: ProbeSettings) -> None:
        for file in files:
            if decoder not in file.decoders:
                continue
            try:
                raster = decode.read(file.data, decoder, settings.channels, settings.bands)
            except Exception as error:  # hostile bytes: any library may raise anything
                told = "out of memory" if isinstance(error, MemoryError) else _one_line(error)
                file.failures.append(f"{decoder.replace('pillow', 'Pillow')}: {told}")
            else:
                _, height, width = raster.bands.shape
                file.accept(decoder, height, width, settings.max_pixels)
                file.result.dtype, file.result.scale = raster.bands.dtype.name, _scale(raster)


def _scale(raster: Raster) -> str:
    """Declared scales as text, one if all bands have the same."""
    scales = [] if raster.scale is None else [f"{scale:.6g}" for scale in raster.scale]
    return ",".join(scales[:1] if len(set(scales)) == 1 else scales)


def _batches(files: list[_File]) -> list[list[_File]]:
    """Cuts where a batch would decode to too many pixels."""
    batches: list[list[_File]] = []
    pixels = 0
    for file in files:
        area = file.result.width * file.result.height
        if not batches or pixels + area > _BATCH_PIXELS:
            batches.append([])
            pixels = 0
        batches[-1].append(file)
        pixels += area
    return batches


def _one_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # "see previous exception for details"
        error = error.__cause__
    text = _MEMORY_NAMES.sub("", " ".join(str(error).split())).strip()
    return (text or type(error).__name__)[:160]


def _reason(file: _File) -> str:
    if file.kind is None and not file.result.width:
        return f"not an image (begins with {file.data[:12]!r})"
    return "; ".join(file.failures) or "cannot decode"
