"""Targets: published checkpoints as `convert` reads them, and the safetensors files that are written."""

import contextlib
import json
import shutil

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from fuzz.mutations import mutate, mutate_tree
from fuzz.run_files import _mutate_zip, _Run, odd_tensor, same
from fuzz.target import Target, expect, judged
from pera_fast.interop.published import convert
from pera_fast.model.export import write_safetensors


class Published(_Run):
    name = "published"
    covers = "the authors' .params files and our checkpoints, bytes and contents, through `convert`"

    def __init__(self, folder):
        super().__init__(folder)
        model = self.state["model"]
        self._files = {
            "pera.params": {"model": model, "optimizer": {}, "scaler": {}, "epoch": 7},
            "plain.params": dict(model),
            "step_00000004.pt": self.states[4],
        }
        for name, contents in self._files.items():
            torch.save(contents, self.folder / name)
            torch.save(contents, self.folder / f"old-{name}", _use_new_zipfile_serialization=False)
        self._expected = {}
        for name in self._files:
            out = self.folder / f"out-{name}"
            convert(self.folder / name, out, 2)
            self._expected[name] = load_file(out / "teacher.safetensors"), load_file(out / "pera.safetensors")

    def run(self, rng):
        name = list(self._files)[int(rng.integers(len(self._files)))]
        path = self.case / name
        kind = rng.random()
        if kind < 0.5:
            path.write_bytes(_mutate_zip((self.folder / name).read_bytes(), rng))
        elif kind < 0.65:  # without a checksum
            path.write_bytes(mutate((self.folder / f"old-{name}").read_bytes(), rng))
        else:
            torch.save(mutate_tree(self._files[name], rng, odd_tensor), path)

        def through() -> str:
            out = self.case / "out"
            convert(path, out, 2)
            found = load_file(out / "teacher.safetensors"), load_file(out / "pera.safetensors")
            if kind < 0.5:
                expect(all(map(same, found, self._expected[name])), "other weights than were written")
            finite = all(value.isfinite().all() for weights in found for value in weights.values())
            expect(finite, "weights that are not finite were converted")
            return "converted"

        outcome = judged(through)
        if outcome == "refused":
            expect(not list(self.case.rglob("*.safetensors")), "refused, but files were written")
        shutil.rmtree(self.case / "out", ignore_errors=True)
        return outcome


class Exports(Target):
    name = "safetensors"
    covers = "the writer of exported weights with odd names, shapes and metadata; its files mutated, given to `convert`"
    _DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool

    def run(self, rng):
        tensors = {self._text(rng): self._tensor(rng) for _ in range(int(rng.integers(0, 4)))}
        metadata = {self._text(rng): [None, 1.5, self._text(rng), [1, "x"]][int(rng.integers(4))] for _ in range(3)}
        path = self.case / "teacher.safetensors"
        write_safetensors(tensors, path, metadata)
        data = path.read_bytes()
        write_safetensors(dict(reversed(tensors.items())), path, dict(reversed(metadata.items())))
        expect(path.read_bytes() == data, "the same contents, other bytes")
        expect(same(load_file(path), tensors), "reads otherwise than it was written")
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
        expect({key: json.loads(value) for key, value in told.items()} == metadata, f"metadata {told}")
        path.write_bytes(mutate(data, rng))
        with contextlib.suppress(SafetensorError):
            load_file(path)

        def through() -> str:
            convert(path, self.case / "out")
            return "converted"

        outcome = judged(through)
        expect(outcome == "refused", "no checkpoint, but converted")
        return outcome

    @staticmethod
    def _text(rng: np.random.Generator) -> str:
        return "".join(
            chr(int(rng.choice([34, 92, 10, 46, 97, 98, 233, 0x1F600, 0x7F, 1]))) for _ in range(rng.integers(1, 6))
        )

    def _tensor(self, rng: np.random.Generator) -> torch.Tensor:
        shape = [int(side) for side in rng.integers(0, 5, size=int(rng.integers(0, 4)))]
        dtype = self._DTYPES[int(rng.integers(len(self._DTYPES)))]
        return torch.from_numpy(np.asarray(rng.integers(0, 2, size=shape))).to(dtype)
