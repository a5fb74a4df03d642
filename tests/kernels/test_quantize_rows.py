"""quantize_rows against its definition, FP8 products against exact ones, and the quantiser of weights."""

import pytest
import torch
from packed_support import each_implementation, randn
from torch import Tensor
from torch.library import opcheck

from pera_kernels import fp8
from pera_kernels.quantize_rows import Slot, WeightQuantizer, op, quantize_parts, quantize_rows
from pera_kernels.quantize_rows.reference import quantize_rows as definition

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


device = each_implementation("quantize_rows", "reference", "pytorch", "triton")


def steps(a: Tensor, b: Tensor) -> Tensor:
    """How many numbers of e4m3 lie between two tensors of finite ones."""

    def order(x: Tensor) -> Tensor:
        bits = x.view(torch.uint8).int()
        return torch.where(bits > 127, 128 - bits, bits)

    return (order(a) - order(b)).abs()


def check_close(got: fp8.Rows, want: tuple[Tensor, Tensor]) -> None:
    """Equal but for the last bit of a scale, and for numbers that this takes across a rounding."""
    assert got.values.dtype == fp8.E4M3
    assert got.scale.dtype == torch.float32
    torch.testing.assert_close(got.scale, want[1].float(), rtol=3e-7, atol=0)
    apart = steps(got.values, want[0])
    assert apart.max() <= 1
    assert apart.float().mean() <= 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 300), (1, 41), (5, 1), (3, 1024), (9, 768)])
def test_matches_the_definition(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x = (randn(*shape) * 10 ** randn(shape[0], 1, seed=1)).to(dtype)
    got = quantize_rows(x.to(device))
    check_close(fp8.Rows(got.values.cpu(), got.scale.cpu()), definition(x))


def test_error_is_that_of_three_bits_of_mantissa(device: torch.device) -> None:
    x = randn(50, 256, dtype=torch.float32).to(device)
    values, scale = quantize_rows(x)
    error = (values.float() * scale - x).abs()
    # Half a step is 2^-4 of a number, and of the subnormal ones 2^-10.
    assert (error <= x.abs() * 2**-4 * 1.001 + scale * 2**-10).all()
    assert (values.float().abs().amax(1) == fp8.LARGEST).all()


def test_rows_of_zeros_and_tiny_ones(device: torch.device) -> None:
    x = torch.zeros(3, 8, device=device)
    x[1] = 1e-40
    x[2, 0] = 1e-20
    values, scale = quantize_rows(x)
    assert not values[:2].float().any()
    assert values[2].tolist() == [448.0, *[0.0] * 7]
    assert scale.isfinite().all()
    assert (scale > 0).all()


def test_not_finite_values_stay_in_their_rows_and_are_seen(device: torch.device) -> None:
    """A teacher that went wrong has to give a loss that is not finite."""
    x = torch.ones(4, 16, device=device)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    values, scale = quantize_rows(x)
    assert (values.float() * scale).isnan().any(1).tolist() == [False, True, True, False]


def test_parts_are_packed(device: torch.device) -> None:
    parts = [randn(n, 24, seed=n, dtype=torch.float32).to(device) for n in (5, 0, 3)]
    got, want = quantize_parts(parts), quantize_rows(torch.cat(parts))
    assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))
    assert torch.equal(got.scale, want.scale)


def test_rows_with_gaps(device: torch.device) -> None:
    wide = randn(6, 64, dtype=torch.float32).to(device)
    got, want = quantize_rows(wide[:, 16:48]), quantize_rows(wide[:, 16:48].contiguous())
    assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))


def test_no_rows_and_bad_shapes(device: torch.device) -> None:
    values, scale = quantize_rows(torch.empty(0, 16, device=device))
    assert (values.shape, scale.shape) == ((0, 16), (0, 1))
    for shape in ((3,), (3, 0), (2, 3, 4)):
        with pytest.raises(ValueError, match="wants matrices"):
            quantize_rows(torch.ones(shape, device=device))
    with pytest.raises(ValueError, match="wants matrices"):
        quantize_parts([torch.ones(2, 16), torch.ones(2, 32)])


def slots(weights: list[Tensor]) -> list[Slot]:
    return [Slot(w, fp8.Rows(torch.empty_like(w, dtype=fp8.E4M3), w.new_empty(w.shape[0], 1))) for w in weights]


def test_weights_are_quantised_in_place_again_and_again(device: torch.device) -> None:
    weights = [randn(*s, seed=i, dtype=torch.float32).to(device) for i, s in enumerate([(48, 16), (16, 64), (7, 16)])]
    some = slots(weights)
    quantizer = WeightQuantizer(some)
    places = [slot.copy.values.data_ptr() for slot in some]
    for factor in (1.0, 3.0):
        for weight in weights:
            weight.mul_(factor)
        quantizer()
        for weight, slot in zip(weights, some, strict=True):
            check_close(fp8.Rows(*(t.cpu() for t in slot.copy)), definition(weight.cpu()))
    assert [slot.copy.values.data_ptr() for slot in some] == places


def test_the_quantiser_refuses_what_does_not_fit() -> None:
    good = slots([torch.ones(4, 16)])[0]
    for bad in (
        Slot(torch.ones(4, 16).half(), good.copy),
        Slot(torch.ones(16, 4).t(), good.copy),
        Slot(good.weight, fp8.Rows(good.copy.values[:2], good.copy.scale)),
        Slot(good.weight, fp8.Rows(good.copy.values, good.copy.scale[:, 0])),
    ):
        with pytest.raises(ValueError, match="WeightQuantizer: slot 1"):
            WeightQuantizer([good, bad])


def test_products(device: torch.device) -> None:
    x, weight, bias = (randn(*s, seed=i, dtype=torch.float32) for i, s in enumerate([(33, 64), (48, 64), (48,)]))
    quantised = quantize_rows(x.to(device))
    got = fp8.linear(quantised, weight.to(device), bias.to(device)).cpu().double()
    a, b = (values.double() * scale for values, scale in (definition(x), definition(weight)))
    same = a @ b.t() + bias.double()
    exact = x.double() @ weight.double().t() + bias.double()
    assert (got - same).norm() <= 4e-3 * same.norm()  # the result's rounding to bfloat16
    assert 0.005 * exact.norm() < (got - exact).norm() < 0.05 * exact.norm()


def test_a_copy_is_taken_while_it_is_up_to_date(device: torch.device) -> None:
    weight = torch.nn.Parameter(randn(16, 32, dtype=torch.float32).to(device))
    assert fp8.in_e4m3(weight).values.shape == (16, 32)
    copy = fp8.Rows(torch.zeros(16, 32, device=device).to(fp8.E4M3), torch.ones(16, 1, device=device))
    weight.fp8_copy, weight.fp8_copy_version = copy, weight._version
    assert fp8.in_e4m3(weight) is copy
    with torch.no_grad():
        weight.mul_(2)
    assert fp8.in_e4m3(weight).values.float().any()


def test_opcheck() -> None:
    opcheck(op._quantize_parts, ([randn(5, 8, dtype=torch.float32), randn(2, 8, dtype=torch.float32)],))


@pytest.mark.parametrize(("capability", "fits"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)])
def test_cards_without_e4m3_are_named(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], fits: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A card")
    reason = fp8.why_not(torch.device("cuda", 0))
    assert (reason is None) == fits
    assert fits or (reason is not None and reason.endswith("Blackwell), A card has 8.0"))
    assert fp8.why_not(torch.device("cpu")) is None
    assert fp8.why_not(torch.device("meta")) is not None
