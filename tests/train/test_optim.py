"""AdamW as docs/method.md section 6.1 says: one group, clipped, and nothing at all where something is not finite."""

import copy
import math

import pytest
import torch
from torch import nn

from pera_fast.config import Config
from pera_fast.train.optim import apply_gradients, make_optimizer, make_scaler
from pera_fast.train.schedules import StepValues
from pera_kernels.products import in_dtype

VALUES = StepValues(lr=0.01, weight_decay=0.1, momentum=0.99, teacher_temp=0.05)
FINE = torch.ones(5)


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    net[2].bias.requires_grad_(False)
    return net


def backward(net: nn.Module, scaler: torch.amp.GradScaler, size: float = 1.0) -> None:
    torch.manual_seed(1)
    scaler.scale(size * net(torch.randn(7, 6)).square().sum()).backward()


def published_adamw(net: nn.Module, cfg: Config) -> torch.optim.AdamW:
    """PyTorch's plain implementation with the published settings, to compare with."""
    trained = [p for p in net.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1, betas=(0.9, 0.999), eps=2e-5, foreach=False)


@pytest.mark.parametrize(("size", "clipped"), [(1.0, True), (1e-3, False)])
def test_step_is_clip_then_adamw(size: float, clipped: bool):
    cfg = Config()
    net, twin = network(), network()
    optimizer, scaler = make_optimizer(net.parameters(), cfg), make_scaler(cfg, torch.device("cpu"))
    assert len(optimizer.param_groups) == 1
    backward(net, scaler, size)
    backward(twin, scaler, size)
    norm, ok = apply_gradients(optimizer, scaler, VALUES, cfg.optim.clip, FINE)

    trained = [p for p in twin.parameters() if p.requires_grad]
    want = math.sqrt(sum(p.grad.square().sum().item() for p in trained))
    assert norm.item() == pytest.approx(want, rel=1e-5)
    assert (want > cfg.optim.clip) == clipped
    assert ok.item() == 1
    for p in trained:
        p.grad.mul_(min(1.0, cfg.optim.clip / (want + 1e-6)))
    published_adamw(twin, cfg).step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_copy_of_a_weight_that_it_updated_is_not_taken():
    """Fused AdamW leaves a parameter's version counter as it was."""
    net = network()
    weight = net[0].weight
    weight.compute_copy, weight.compute_copy_version = weight.detach().bfloat16(), weight._version
    assert in_dtype(weight, torch.bfloat16) is weight.compute_copy
    optimizer, scaler = make_optimizer(net.parameters(), Config()), make_scaler(Config(), torch.device("cpu"))
    backward(net, scaler)
    apply_gradients(optimizer, scaler, VALUES, 3.0, FINE)
    assert torch.equal(in_dtype(weight, torch.bfloat16), weight.bfloat16())
    assert not torch.equal(weight.compute_copy, weight.bfloat16())


@pytest.mark.parametrize("where", ["losses", "gradients"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_changes_nothing(where: str, value: float):
    cfg = Config()
    net = network()
    optimizer, scaler = make_optimizer(net.parameters(), cfg), make_scaler(cfg, torch.device("cpu"))
    backward(net, scaler)
    apply_gradients(optimizer, scaler, VALUES, 3.0, FINE)  # so that there are moments to spoil
    before, moments = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.zero_grad()
    backward(net, scaler)
    losses = FINE.clone()
    if where == "losses":
        losses[3] = value
    else:
        net[0].weight.grad[1, 1] = value
    _, ok = apply_gradients(optimizer, scaler, VALUES, 3.0, losses)
    assert ok.item() == 0
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[key], moments[index][key]) for key in state)
    optimizer.zero_grad()
    backward(net, scaler)
    assert apply_gradients(optimizer, scaler, VALUES, 3.0, FINE)[1].item() == 1
    assert not torch.equal(before["0.weight"], net[0].weight)


def test_loss_scaling_does_not_change_the_step():
    cfg = Config().with_values({"train.precision": "fp16"})
    plain, scaled = network(), network()
    norms = []
    for net, config in ((plain, Config()), (scaled, cfg)):
        optimizer, scaler = make_optimizer(net.parameters(), config), make_scaler(config, torch.device("cpu"))
        backward(net, scaler)
        norms.append(apply_gradients(optimizer, scaler, VALUES, 3.0, FINE)[0].item())
    assert norms[0] == norms[1]  # the scale is a power of two
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(a, b)


def test_schedule_values_are_those_used():
    cfg = Config()
    net = network()
    optimizer, scaler = make_optimizer(net.parameters(), cfg), make_scaler(cfg, torch.device("cpu"))
    before = copy.deepcopy(net.state_dict())
    backward(net, scaler)
    still = StepValues(lr=0.0, weight_decay=0.5, momentum=1.0, teacher_temp=0.05)
    apply_gradients(optimizer, scaler, still, 3.0, FINE)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
