"""AdamW over all trained parameters, gradient clipping, loss scaling for fp16 (docs/method.md section 6.1).

A step whose loss or gradients are not finite must change nothing. That is decided on the device: the fused AdamW takes
a flag `found_inf` and does nothing where it is set, so the update is launched without the host having to look first.
It takes a divisor of the gradients as well, `grad_scale`, which is where the clipping goes.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pera_fast.config import Config
from pera_fast.train.schedules import StepValues


def make_optimizer(parameters: Iterable[torch.nn.Parameter], cfg: Config) -> torch.optim.AdamW:
    """AdamW with one group: biases and norms decay like the rest. Fused: both CPU and CUDA support it."""
    trained = [p for p in parameters if p.requires_grad]
    o = cfg.optim
    return torch.optim.AdamW(trained, lr=o.lr, betas=(o.betas[0], o.betas[1]), eps=o.eps, fused=True)


def make_scaler(cfg: Config, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling for fp16; does nothing for bf16 and fp32, whose gradients do not underflow."""
    return torch.amp.GradScaler(device.type, enabled=cfg.train.precision == "fp16")


def apply_gradients(
    optimizer: torch.optim.AdamW,
    scaler: torch.amp.GradScaler,
    values: StepValues,
    clip: float,
    losses: Tensor,  # f32 [any]: the step is skipped unless all are finite
) -> tuple[Tensor, Tensor]:
    """Unscales, clips and applies the gradients; does nothing to the parameters if anything is not finite.

    A group's learning rate and weight decay are the schedules', times its `lr_scale` and `decay_scale` if it has them.

    Returns:
        (norm, ok) on the device, f32 [] each: the gradient norm before clipping, and 1 if the update was made, else 0.
    """
    scaler.unscale_(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = values.lr * group.get("lr_scale", 1.0)
        group["weight_decay"] = values.weight_decay * group.get("decay_scale", 1.0)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    ok = torch.isfinite(losses).all() & torch.isfinite(norm)
    fused: Any = optimizer  # set here rather than by scaler.step(), which sees infinite gradients only, in fp16 only
    fused.grad_scale = ((norm + 1e-6) / clip).clamp(min=1)  # AdamW divides by it: clipping costs no pass of its own
    fused.found_inf = (~ok).to(torch.float32)
    optimizer.step()
    # Fused AdamW does not count as a write, but whoever keeps a copy of a parameter must see that it is stale.
    torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])
    scaler.update()  # lowers the scale after infinite gradients, raises it after many good steps
    return norm, ok.to(torch.float32)
