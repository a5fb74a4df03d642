"""Launches on the device of the tensors: which functions are decorated, and what the decorator does."""

import ast
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pera_kernels import launching

FOLDER = Path(launching.__file__).parent


class OnSecondGpu(Tensor):
    """A tensor that says that it lies on the second GPU."""

    is_cuda = True  # pyright: ignore[reportAssignmentType]
    device = torch.device("cuda", 1)  # pyright: ignore[reportAssignmentType]


@pytest.mark.parametrize(("current", "entered"), [(0, [torch.device("cuda", 1)]), (1, [])])
def test_the_device_of_the_first_tensor_is_entered(
    current: int, entered: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, inside = [], []

    @contextmanager
    def device(wanted: torch.device):
        seen.append(wanted)
        inside.append(True)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", device)

    @launching.on_their_device
    def launch(count: int, x: Tensor) -> tuple[int, bool]:
        return count, bool(inside)

    x = torch.zeros(3).as_subclass(OnSecondGpu)
    assert launch(7, x) == (7, bool(entered))
    assert seen == entered
    assert launch(7, torch.zeros(3)) == (7, False)
    inside_tuples: Any = (3, (None, x)), torch.zeros(3)
    assert launch(7, inside_tuples) == (7, bool(entered))


def launchers(path: Path) -> list[str]:
    """Functions of a module that launch a kernel without entering the device of their tensors."""
    source, found = path.read_text(encoding="utf-8"), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and "_kernel[" in (text := ast.get_source_segment(source, node) or ""):
            decorated = any(isinstance(d, ast.Name) and d.id == "on_their_device" for d in node.decorator_list)
            if not decorated and "with device_of(" not in text:
                found.append(f"{path.parent.name}.{node.name}")
    return found


def test_every_launch_is_on_the_device_of_its_tensors() -> None:
    found = [name for path in sorted(FOLDER.rglob("*.py")) for name in launchers(path)]
    assert found == ["adamw_ema.prepare", "adamw_ema.apply"]  # op.AdamWEma enters its device around both
