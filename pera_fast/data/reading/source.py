"""Reads the encoded bytes or the raster of a sample, and handles files that changed or vanished since the index."""

import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from queue import SimpleQueue

import numpy as np

from pera_fast.data.decoding import decode
from pera_fast.data.decoding.dali import CpuDecoder
from pera_fast.data.decoding.formats import HEAD_BYTES, sniff
from pera_fast.data.decoding.probe import ProbeResult, ProbeSettings, answered, os_reason, read_file
from pera_fast.data.decoding.sandbox import Sandbox
from pera_fast.data.decoding.scaling import Raster, Scaling
from pera_fast.data.decoding.tar import Member
from pera_fast.data.files.manifest import Manifest
from pera_fast.data.files.shards import locate, place_of
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.reading.reduced import ReducedDecoder
from pera_fast.errors import UserError
from pera_fast.keyed import Purpose, generator
from pera_fast.storage import TIMEOUT, AloneError, Storage

_log = logging.getLogger("pera_fast")
_READS = 3  # of a file that changes under our hands
_DRAWS = 64  # substitutes drawn before the rest is walked in order


@dataclass
class Image:
    """A file's content, ready for the pipeline."""

    sample: int  # row that it came from
    data: np.ndarray  # uint8 [bytes], encoded; or uint8 or uint16 [H, W, C] where the pipeline takes arrays
    height: int  # of the whole image, upright
    width: int
    factor: int = 1  # how many times smaller it was decoded
    shift: tuple[float, float] = (0.0, 0.0)  # y of the whole image is y / factor + shift[0] in the decoded one
    decoded: bool = False  # by another decoder than the pipeline's; data is then a PNM file or an array


class _UnusableError(Exception):
    """Nothing can decode this file; the message says why."""


class _OutOfReachError(Exception):
    """The storage gives every file but this one; the message says why."""


class SampleSource:
    """Reads samples. A file that cannot be used is reported once and another sample stands in for it.

    Files whose size and time are those of the index are decoded in this process; others are checked in a sandbox
    first, because a decoder can die by a signal. A read that fails for the storage's or the machine's sake is repeated
    and never held against the file. Thread-safe.

    Args:
        manifest: of the data folder.
        settings: how the files are used; `verify` is taken as True.
        seed: the run's seed.
        skipped: where unusable files are reported.
        sandboxes: the most processes that check files at a time.
        scaling: how values become pixels where the pipeline takes arrays.
        reduced: decodes JPEG files at a smaller size where their crops allow it; None: the pipeline decodes them all.
        timeout: seconds that are waited for a storage that does not answer.
        on_gpu: the pipeline decodes on a GPU. What that refuses (`distrust`) is then decoded on the CPU.
    """

    def __init__(
        self,
        manifest: Manifest,
        settings: ProbeSettings,
        seed: int,
        skipped: SkippedFiles,
        sandboxes: int = 1,
        scaling: Scaling | None = None,
        reduced: ReducedDecoder | None = None,
        timeout: float = TIMEOUT,
        on_gpu: bool = False,
    ):
        self._root = os.fspath(manifest.root)
        self.storage = Storage(self._root, timeout)
        self._files = manifest.readable
        self._settings = replace(settings, verify=True)
        self._scaling = scaling or Scaling()
        self._reduced = reduced
        self._seed, self._skipped = seed, skipped
        self._checked: dict[int, ProbeResult] = {}  # newer than the index
        self._unusable: set[int] = set()
        self._dali = CpuDecoder(settings.channels) if on_gpu and settings.encoded else None
        self._on_cpu: set[int] = set()  # which the GPU's decoder refused
        self._lock = threading.Lock()
        self._sandboxes = [Sandbox() for _ in range(max(1, sandboxes))]
        self._idle: SimpleQueue[Sandbox] = SimpleQueue()
        for sandbox in self._sandboxes:
            self._idle.put(sandbox)
        decode.allow_pixels(settings.max_pixels)

    def fetch(self, epoch: int, sample: int) -> Image:
        """The sample's image, or its substitute's: the same one whenever the same files are unusable.

        Raises:
            UserError: no readable image is left.
            MachineError: the storage did not answer in time.
        """
        for row in self._candidates(epoch, sample):
            if row in self._unusable:
                continue
            try:
                return self._image(epoch, row, *self._load(row))
            except _UnusableError as error:
                self._reject(row, str(error))
            except _OutOfReachError as error:  # tried again when it is drawn again
                _log.warning("%s: %s: another image takes its place this time", self._path(row), error)
        raise UserError(f"no readable image is left in {self._root}: all {len(self._files)} have become unreadable")

    def fetch_only(self, sample: int) -> Image | None:
        """The sample's image, for which no other stands in; None if it cannot be used, which is reported.

        Raises:
            MachineError: the storage did not answer in time.
        """
        if sample in self._unusable:
            return None
        try:
            return self._image(0, sample, *self._load(sample))
        except (_UnusableError, _OutOfReachError) as error:
            self._reject(sample, str(error))
            return None

    def distrust(self, image: Image, reason: str) -> None:
        """The pipeline failed on this in spite of the check: from now on another decoder reads it, or nothing does.

        On a GPU that other decoder is DALI's on the CPU, which checked the file: nvJPEG and its kin refuse other files.
        """
        sample = image.sample
        if image.decoded:
            self._reject(sample, f"DALI: {reason}")  # what the other decoder made of it is what DALI refuses
            return
        if self._known(sample).decoder not in ("", "dali") or sample in self._on_cpu:
            return  # read before that was known
        may_ask_dali = self._dali is not None
        others = tuple(decoder for decoder in self._settings.decoders if decoder != "dali" or may_ask_dali)
        try:
            result = self._probe(self._path(sample), others)
        except _OutOfReachError as error:
            result = ProbeResult("", reason=str(error))
        if result.ok:
            with self._lock:
                self._checked[sample] = result
                if result.decoder == "dali":
                    self._on_cpu.add(sample)
            if may_ask_dali:
                _log.warning(
                    "%s: the GPU's decoder refuses it (%s); it is decoded on the CPU", self._path(sample), reason
                )
        else:
            self._reject(sample, f"DALI: {reason}; {result.reason}")

    def close(self) -> None:
        """Ends the sandboxes; a fetch that waits for one, or for the storage, raises RuntimeError."""
        self.storage.close()
        for sandbox in self._sandboxes:
            sandbox.close()

    def _candidates(self, epoch: int, sample: int) -> Iterator[int]:
        yield sample
        draws = generator(self._seed, Purpose.SUBSTITUTE, epoch, sample).integers(len(self._files), size=_DRAWS)
        yield from map(int, draws)
        start = int(draws[-1])
        for step in range(1, len(self._files) + 1):
            yield (start + step) % len(self._files)

    def _path(self, row: int) -> str | Member:
        files = self._files
        return locate(self._root, files.paths[row].as_py(), int(files.offset[row]), int(files.size[row]))

    def _load(self, row: int) -> tuple[bytes, ProbeResult]:
        """The file's bytes and what is known about them. Raises _UnusableError, _OutOfReachError, MachineError."""
        path = self._path(row)
        place = place_of(path)
        reason = "changes all the time"
        for _ in range(_READS):
            try:
                data, state = self.storage(lambda: read_file(path), *place)
            except AloneError as error:
                raise _OutOfReachError(os_reason(error)) from error
            except OSError as error:
                reason = os_reason(error)
                if error.errno is not None:
                    break
                continue  # it changed while it was read
            known = self._known(row)
            if (known.size, known.mtime_ns) != (state.st_size, state.st_mtime_ns):
                known = self._probe(path)
                if (known.size, known.mtime_ns) != (state.st_size, state.st_mtime_ns):
                    continue  # it changed again meanwhile
                if not known.ok:
                    raise _UnusableError(known.reason)
                with self._lock:
                    self._checked[row] = known
            return data, known
        raise _UnusableError(reason)

    def _known(self, row: int) -> ProbeResult:
        """Last known size of the file; -1 if it was never decoded."""
        if (newer := self._checked.get(row)) is not None:
            return newer
        files = self._files
        decoder = files.decoder[row].as_py()
        return ProbeResult(
            path="",
            ok=True,
            decoder=decoder,
            width=int(files.width[row]),
            height=int(files.height[row]),
            size=int(files.size[row]) if decoder else -1,
            mtime_ns=int(files.mtime_ns[row]),
        )

    def _image(self, epoch: int, row: int, data: bytes, known: ProbeResult) -> Image:
        if known.decoder == "dali":
            if self._reduced is not None and sniff(data[:HEAD_BYTES]) == "jpeg":
                small = self._reduced(data, epoch, row, known.height, known.width)
                if small is not None:
                    # As an array, past DALI, which would copy a PPM of it slowly.
                    return Image(row, small.pixels, known.height, known.width, small.factor, small.shift)
            if row not in self._on_cpu:
                return Image(row, np.frombuffer(data, np.uint8), known.height, known.width)
        settings = self._settings
        try:
            if known.decoder == "dali":
                assert self._dali is not None
                pixels = self._dali(data)
            else:
                pixels = self._scaling(decode.read(data, known.decoder, settings.channels, settings.bands))
            pixels = np.require(pixels, requirements="W")  # what Pillow gave is not; PyTorch would remark on that
        except Exception as error:  # it decoded when it was checked; whatever it is now, it must not end the run
            raise _UnusableError(f"{known.decoder}: {error}") from error
        height, width = pixels.shape[:2]
        content = decode.as_pnm(pixels) if settings.encoded else pixels
        return Image(row, content, height, width, decoded=True)

    def raster(self, sample: int) -> Raster | None:
        """The sample's values as they are stored; None if it cannot be used."""
        try:
            data, known = self._load(sample)
        except (_UnusableError, _OutOfReachError) as error:  # whoever measures takes another one
            _log.debug("%s cannot be measured: %s", self._path(sample), error)
            return None
        settings = self._settings
        try:
            if known.decoder == "dali":  # what it decodes one of the others does
                return decode.read_any(data, settings.channels, settings.bands)
            return decode.read(data, known.decoder, settings.channels, settings.bands)
        except Exception as error:
            _log.debug("%s cannot be measured: %s", self._path(sample), error)
            return None

    def _probe(self, path: str | Member, decoders: tuple[str, ...] | None = None) -> ProbeResult:
        def once() -> ProbeResult:
            sandbox = self._idle.get()
            try:
                return answered(sandbox.probe([path], self._settings, decoders)[0])
            finally:
                self._idle.put(sandbox)

        try:
            return self.storage(once, *place_of(path))
        except AloneError as error:
            raise _OutOfReachError(os_reason(error)) from error

    def _reject(self, row: int, reason: str) -> None:
        with self._lock:
            self._unusable.add(row)
        self._skipped.add(self._files.paths[row].as_py(), reason)
