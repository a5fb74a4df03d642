"""Half-precision copies of the weights that matrix products read.

Parameters are float32. A cast of each before its product would be hundreds of launches a step, so a copy of each lies
in one buffer a network, and the optimiser's pass writes it together with the parameter (``pera_kernels.adamw_ema``).
``pera_kernels.products.in_dtype`` takes a copy only while it is up to date.
"""

import torch
from torch import Tensor, nn

from pera_fast.model.pera import PerA
from pera_kernels import backend
from pera_kernels.products import product_dtype


def make_copies(model: PerA) -> None:
    """Give the linear layers of blocks and heads' MLPs their copies.

    Does nothing where products run in float32, or where PyTorch's operators make the update, which write no copies.

    Every weight and bias gets ``compute_copy``, a tensor of its shape in the compute dtype, equal to it. Weights of the
    teacher that products take in FP8 get that copy instead, on any device.
    """
    model.make_fp8()
    device = next(model.parameters()).device
    if (
        product_dtype(model.compute_dtype, device) == torch.float32
        or backend.choose("adamw_ema", device) == "reference"
    ):
        return
    for network in (model.student, model.teacher, model.pred_head):
        layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
        parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None and _wants_copy(p)]
        if not parameters:
            continue
        sizes = [-(-p.numel() // 64) * 64 for p in parameters]  # whole cache lines: every copy is aligned
        buffer = torch.empty(sum(sizes), dtype=model.compute_dtype, device=parameters[0].device)
        for parameter, part in zip(parameters, buffer.split(sizes), strict=True):
            _set(parameter, part[: parameter.numel()].view(parameter.shape))
    refresh_copies(model)


def _wants_copy(parameter: Tensor) -> bool:
    return not hasattr(parameter, "fp8_copy")


def _set(parameter: Tensor, copy: Tensor) -> None:
    parameter.compute_copy = copy  # pyright: ignore[reportAttributeAccessIssue]


def copy_of(parameter: Tensor) -> Tensor | None:
    """The copy of a parameter, or None."""
    return getattr(parameter, "compute_copy", None)


@torch.no_grad()
def refresh_copies(model: PerA) -> None:
    """Write all copies anew: after anything but the optimiser's pass has changed parameters."""
    copies = [(copy, p) for p in model.parameters() if (copy := copy_of(p)) is not None]
    if copies:
        torch._foreach_copy_([copy for copy, _ in copies], [p for _, p in copies])
    for _, parameter in copies:
        parameter.compute_copy_version = parameter._version  # pyright: ignore[reportAttributeAccessIssue]
    model.refresh_fp8()
