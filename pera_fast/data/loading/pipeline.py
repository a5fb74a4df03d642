"""The image pipeline: takes encoded bytes or arrays with crop windows, returns integer crops.

Each crop is made once; student and teacher share it. Windows and flips come from `views.Windows.roi`. The resize is
bilinear with antialias. On a CPU DALI decodes, unless images come as arrays, and `host_crops` resizes. On a GPU DALI
does both; at the border of a window it reads the image's own pixels beyond it, as Pillow's `resize(box=...)` does and
crop-then-resize does not; beyond the image's own border it repeats the last pixel. Both show in the outermost pixels of
a crop only.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pera_fast.config.tree import ViewsConfig
from pera_fast.data.decoding.dali import require_dali
from pera_fast.data.decoding.decode import as_pnm
from pera_fast.data.loading.decode_on import has_jpeg_hardware
from pera_fast.data.loading.host_crops import HostCropper
from pera_fast.data.loading.streams import host_empty, wait

_ANY = as_pnm(np.zeros((1, 1, 1), np.uint8))  # for DALI, where a batch has nothing to decode: it counts the batches


class CropPipeline:
    """Decodes, crops, resizes and flips batches. `depth` batches are kept under way, handed back in order.

    Submit `depth` batches, then collect and submit in turns: the first `depth` only start together. A batch that cannot
    be decoded raises from `submit` or `collect`; the pipeline is of no use after that.

    Args:
        views: cfg.views.
        channels: of the images: 3 decodes to RGB, 1 to gray; any other number takes raw HWC arrays.
        batch_size: the most images of one batch.
        threads: decoding threads.
        device: where the crops are made and handed over.
        depth: batches under way at a time; with two, one is decoded while the other is resized and copied.
        raw: bits of a value, 8 or 16, if the images come as arrays, uint8 or uint16 [H, W, C]; None: as encoded files
            where that is possible (on a CPU some may be arrays).
        pinned: on a CPU, make the crops in memory that is copied to a GPU while the threads go on.
    """

    def __init__(
        self,
        views: ViewsConfig,
        channels: int,
        batch_size: int,
        threads: int,
        device: torch.device,
        *,
        depth: int = 2,
        raw: int | None = None,
        pinned: bool = False,
    ):
        self.depth, self._pinned = depth, pinned
        self._encoded = raw is None and channels in (1, 3)
        self._dtype = torch.uint16 if raw == 16 else torch.uint8
        self._numpy_type = np.dtype(np.uint16 if raw == 16 else np.uint8)
        self.views, self.channels, self.device = views, channels, device
        self._sides = [views.global_size] * views.num_global + [views.local_size] * views.num_local
        on_gpu = device.type == "cuda"
        self._host = None if on_gpu else HostCropper(threads)
        self._windows: deque[tuple[np.ndarray, np.ndarray]] = deque()  # of the batches under way, if the host crops
        self._arrays: deque[list[np.ndarray | None]] = deque()  # their images; None: DALI decodes it
        self._under_way: deque[int] = deque()  # number of images of each batch
        self._started = False
        self._pipe = self._build(batch_size, threads, on_gpu) if on_gpu or self._encoded else None

    def _build(self, batch_size: int, threads: int, on_gpu: bool) -> Any:
        dali, device = require_dali(), self.device
        pipe = dali.Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=(device.index if device.index is not None else torch.cuda.current_device()) if on_gpu else None,
            prefetch_queue_depth=self.depth,
            set_affinity=False,
        )
        with pipe:
            pipe.set_outputs(*self._outputs(dali, on_gpu))
        pipe.build()
        return pipe

    def _outputs(self, dali: Any, on_gpu: bool) -> list[Any]:
        fn, types = dali.fn, dali.types
        if self._encoded:
            output_type = types.RGB if self.channels == 3 else types.GRAY
            source = fn.external_source(name="images", device="cpu")
            images = fn.decoders.image(
                source, device="mixed" if on_gpu else "cpu", output_type=output_type, **self._decoder_options()
            )
        else:
            images = fn.external_source(name="images", device="cpu", layout="HWC").gpu()
        if self._host is not None:
            return [images]
        return [
            fn.resize(
                images,
                size=[side, side],
                roi_start=fn.external_source(name=f"start{crop}", device="cpu"),
                roi_end=fn.external_source(name=f"end{crop}", device="cpu"),
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
            for crop, side in enumerate(self._sides)
        ]

    def _decoder_options(self) -> dict[str, Any]:
        """All JPEG files go to the GPU's hardware decoder, if it has one; DALI gives it 65 %, the rest to kernels."""
        return {"hw_decoder_load": 1.0} if has_jpeg_hardware(self.device) else {}

    def submit(self, images: Sequence[np.ndarray], start: np.ndarray, end: np.ndarray) -> None:
        """Starts a batch.

        Args:
            images: B encoded files, uint8 [bytes], or arrays, uint8 or uint16 [H, W, C], see `raw`.
            start: float32 [crops, B, 2], corner of each window that becomes the crop's first pixel, (y, x).
            end: float32 [crops, B, 2], the opposite corner.
        """
        if self._host is not None:
            self._windows.append((start, end))
            self._arrays.append([image if image.ndim == 3 else None for image in images])
            images = [image for image in images if image.ndim == 1] or [_ANY]
        if self._pipe is None:
            return
        self._pipe.feed_input("images", list(images))
        if self._host is None:
            for crop in range(len(self._sides)):
                self._pipe.feed_input(f"start{crop}", start[crop])
                self._pipe.feed_input(f"end{crop}", end[crop])
        self._under_way.append(len(images))
        if self._started or len(self._under_way) == self.depth:
            self._started = True
            self._pipe.schedule_run()  # the first call starts `depth` batches at once

    def collect(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(global, local) crops of the oldest batch: uint8 or uint16 [crops * B, H, W, C], crop-major, a copy."""
        if self._pipe is None:
            return self._host_crops([])
        batch = self._under_way.popleft()
        outputs = self._pipe.share_outputs()
        try:
            split = self.views.num_global
            if self._host is not None:
                return self._host_crops([np.asarray(outputs[0][slot]) for slot in range(batch)])  # no copies
            return (
                self._gather(outputs[:split], batch, self.views.global_size),
                self._gather(outputs[split:], batch, self.views.local_size),
            )
        finally:
            self._pipe.release_outputs()

    def submit_blank(self) -> None:
        """Starts a batch of one image of one pixel, in place of a batch of which no image is left."""
        image = _ANY if self._encoded else np.zeros((1, 1, self.channels), self._numpy_type)
        corners = np.zeros((len(self._sides), 1, 2), np.float32)
        self.submit([image], corners, corners + 1)

    def try_out(self) -> None:
        """Crops an image of one pixel: raises where the pipeline or its device is at fault, not a file."""
        self.submit_blank()
        self.collect()

    def _host_crops(self, decoded: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._host is not None
        groups, views, by_dali = [], self.views, iter(decoded)
        images = [next(by_dali) if array is None else array for array in self._arrays.popleft()]
        for crops, side in ((views.num_global, views.global_size), (views.num_local, views.local_size)):
            shape = (crops, len(images), side, side, self.channels)
            groups.append(host_empty(shape, self._dtype, self._pinned))
        self._host(images, *self._windows.popleft(), groups)
        return groups[0].flatten(0, 1), groups[1].flatten(0, 1)

    def _gather(self, outputs: Sequence[Any], batch: int, side: int) -> torch.Tensor:
        # One copy: DALI's buffers are reused by the next batches, and a group is one tensor.
        group = torch.empty((len(outputs) * batch, side, side, self.channels), dtype=self._dtype, device=self.device)
        for crop, output in enumerate(outputs):
            group[crop * batch : (crop + 1) * batch].copy_(torch.from_dlpack(output.as_tensor()))
        wait(self.device)  # before DALI gets its buffers back
        return group
