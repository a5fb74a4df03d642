"""The end of a step: clipping, AdamW, the teacher's EMA; where `adamw_ema` runs, the center too."""

from collections.abc import Callable

import torch

from pera_bench.point import Point
from pera_bench.work import Cost, Whole
from pera_fast.model.pera import PerA
from pera_fast.profile.simulate import VALUES
from pera_fast.train.api import make_model
from pera_fast.train.fused_update import make_update
from pera_fast.train.optim import apply_gradients, make_optimizer, make_scaler

IMPLEMENTATIONS = ("reference", "pera-fast")
CASES = {"all": ("step",)}


def make(point: Point, case: str) -> Whole:
    """Gradients read for their norm; gradients, weights and two moments read, the last three written; EMA: 2 read, 1
    written. All float32."""
    model = make_model(point.cfg).to(point.device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    averaged = sum(p.numel() for p in model.teacher.parameters())

    def ready(optimizer: torch.optim.AdamW, call: Callable[[], object]) -> Callable[[], object]:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.full_like(parameter, 1e-3)
        return call

    def ours() -> Callable[[], object]:
        optimizer, scaler = make_optimizer(model.parameters(), point.cfg), make_scaler(point.cfg, point.device)
        losses = torch.zeros(1, device=point.device)

        update = make_update(model, optimizer, scaler)
        mean = torch.zeros(point.cfg.model.bottleneck, device=point.device)

        def call() -> None:
            if update is not None:
                update(losses, mean, VALUES, point.cfg.optim.clip)
                return
            apply_gradients(optimizer, scaler, VALUES, point.cfg.optim.clip, losses)
            model.update_teacher(VALUES.momentum)

        return ready(optimizer, call)

    return Whole(
        {"reference": lambda: ready(*_plain(model, point)), "pera-fast": ours},
        Cost(moved=4 * (8 * trained + 3 * averaged)),
    )


def _plain(model: PerA, point: Point) -> tuple[torch.optim.AdamW, Callable[[], object]]:
    """One parameter after the other."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=VALUES.lr, weight_decay=VALUES.weight_decay, foreach=False)

    def call() -> None:
        torch.nn.utils.clip_grad_norm_(trained, point.cfg.optim.clip, foreach=False)
        optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
                mine.mul_(VALUES.momentum).add_(theirs, alpha=1 - VALUES.momentum)

    return optimizer, call
