"""Targets: files of a run folder, as `--resume` and `--resume auto` read them."""

import json
import math
import shutil

import numpy as np
import torch
from train_support import SMALL, make_run, small_config

from fuzz.mutations import mutate, mutate_text, mutate_tree
from fuzz.target import Target, expect, judged
from pera_fast.config import from_yaml
from pera_fast.train.checkpoint import checkpoint_path, load_newest, save_checkpoint
from pera_fast.train.early import answer, write_finished
from pera_fast.train.run_folder import RunFolder, check_resumed_batch, resumed_position, start_auto, start_resumed


def same(a, b) -> bool:
    """Whether two structures hold the same, tensors to the bit."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)) or (a.dtype, a.shape) != (
            b.dtype,
            b.shape,
        ):
            return False
        return torch.equal(_bytes(a), _bytes(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8) if len(flat) else torch.empty(0, dtype=torch.uint8)


class _Run(Target):
    """A run of a few thousand weights with one step done."""

    def __init__(self, folder):
        super().__init__(folder)
        self.cfg = small_config()
        self.run_ = make_run(self.cfg, self.folder / "run")
        for parameter in self.run_.pera.parameters():
            parameter.grad = torch.full_like(parameter, 0.1) if parameter.requires_grad else None
        self.run_.optimizer.step()
        self.run_.step = self.run_.position = 4
        self.state = self.run_.state()
        self.states = {step: {**self.state, "step": step, "position": step} for step in (2, 4)}


class Checkpoints(_Run):
    name = "checkpoints"
    covers = "bytes of the newest checkpoint; equal to what was written, or refused"

    def __init__(self, folder):
        super().__init__(folder)
        self._whole = self.folder / "whole"
        for step in (2, 4):
            save_checkpoint(self._whole, self.states[step], 3)
        self._bytes = checkpoint_path(self._whole, 4).read_bytes()

    def run(self, rng):
        shutil.copyfile(checkpoint_path(self._whole, 2), checkpoint_path(self.case, 2))
        checkpoint_path(self.case, 4).write_bytes(_mutate_zip(self._bytes, rng))

        def load() -> str:
            found = load_newest(self.case)
            expect(found is not None and found[0] == checkpoint_path(self.case, 4), "another checkpoint was taken")
            expect(same(found[1], self.states[4]), "other contents than were written")
            return "read"

        return judged(load)


def _mutate_zip(data: bytes, rng: np.random.Generator) -> bytes:
    """In every other case near the end, where the directory is, or at one place of the many bytes between."""
    if rng.random() < 0.5:
        at = max(0, len(data) - 6000)
        return data[:at] + mutate(data[at:], rng)
    at = int(rng.integers(len(data)))
    return data[:at] + mutate(data[at : at + 300], rng) + data[at + 300 :]


def odd_tensor(value, rng: np.random.Generator):
    """Another tensor for a tensor, another number for a number."""
    if isinstance(value, torch.Tensor):
        made = [
            value.flatten()[:-1], value.new_zeros(0), value.double(), value.to(torch.int64), value[None], "tensor",
            value.to(torch.complex64), value.to_sparse() if value.ndim else None, value.half(),
            value.new_full(value.shape, math.nan) if value.is_floating_point() else None,
            value.new_full(value.shape, math.inf) if value.is_floating_point() else None,
        ]  # fmt: skip
        return made[int(rng.integers(len(made)))]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [-value - 1, value * 10**6, float(value), str(value), [value]][int(rng.integers(5))]
    return None


class Contents(_Run):
    name = "checkpoint-contents"
    covers = "checkpoints that are whole, with fields, shapes, types and values that do not fit"

    def run(self, rng):
        contents = mutate_tree(self.states[4], rng, odd_tensor)
        path = checkpoint_path(self.case, 4)
        torch.save(contents, path)

        def resume() -> str:
            found = load_newest(self.case)
            expect(found is not None, "the checkpoint is not found")
            state = found[1]
            cfg = from_yaml(state["config"])
            check_resumed_batch(state, 4, 1)
            resumed_position(state, 4, 1, 12)
            fresh = make_run(cfg if cfg == self.cfg else self.cfg, self.folder / "fresh")
            fresh.load(state, str(self.case))
            expect(all(p.isfinite().all() for p in fresh.pera.state_dict().values()), "weights that are not finite")
            fresh.optimizer.zero_grad()
            for parameter in fresh.pera.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            fresh.optimizer.step()
            finite = all(p.isfinite().all() for p in fresh.pera.parameters())
            expect(finite, "the first update makes weights that are not finite")
            again = fresh.state()
            expect(isinstance(again["step"], int) and again["step"] >= 0, f"step {again['step']!r}")
            expect(isinstance(again["nonfinite"].get("row"), int), f"nonfinite {again['nonfinite']!r}")
            return "resumed"

        return judged(resume)


class RunFolders(_Run):
    name = "run-folders"
    covers = "config.yaml, asked.yaml, metrics.jsonl, finished.json of a run"

    def __init__(self, folder):
        super().__init__(folder)
        run = RunFolder(self.folder / "whole")
        run.make()
        run.write_config(self.cfg, self.cfg)
        lines = [{"step": step, "epoch": 0, "loss": 1.5 / step, "lr": 1e-4, "mem": None} for step in range(1, 7)]
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        save_checkpoint(run.checkpoints, {**self.state, "step": 6, "position": 6}, 3)
        run.teacher.parent.mkdir()
        run.teacher.write_bytes(b"teacher")
        write_finished(run, 6, 6, 3, 4)
        self._whole = run.root

    def run(self, rng):
        root = self.case / "run"
        shutil.copytree(self._whole, root)
        folder = RunFolder(root)
        if rng.random() < 0.5:
            shutil.rmtree(folder.checkpoints)
        files = [folder.config, folder.asked, folder.metrics, folder.finished]
        path = files[int(rng.integers(len(files)))]
        text = path.read_text()
        if path == folder.finished and rng.random() < 0.5:
            path.write_text(json.dumps(mutate_tree(json.loads(text), rng), default=str))
        elif path == folder.metrics and rng.random() < 0.5:
            lines = text.splitlines()
            at = int(rng.integers(len(lines)))
            lines[at] = json.dumps(mutate_tree(json.loads(lines[at]), rng), default=str)
            path.write_text("\n".join(lines) + "\n")
        else:
            path.write_bytes(mutate_text(text, rng))

        def early() -> str:
            done = answer("/data", root, None, [], True)
            return "goes-on" if done is None else "done"

        def resumed() -> str:
            start_resumed(folder, None, [])
            return "resumed"

        def auto() -> str:
            start_auto(folder, "tiny", SMALL)
            return "resumed"

        def cut() -> str:
            folder.cut_metrics(4)
            kept = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
            expect(all(line["step"] <= 4 for line in kept), "a later step was kept")
            return "cut"

        return " ".join(judged(action) for action in (early, resumed, auto, cut))
