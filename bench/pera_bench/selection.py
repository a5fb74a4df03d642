"""Selects the suites, cases and implementations of a run."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING

from pera_bench.suites import SUITES
from pera_fast.config.keys import did_you_mean
from pera_fast.errors import UserError

if TYPE_CHECKING:  # wrong names are answered before torch is loaded
    import torch

# Where nothing is named: of the step, the case that is the recipes' own.
DEFAULT = tuple("step/cheap" if suite == "step" else suite for suite in SUITES)


def load(suite: str) -> ModuleType:
    """The suite's module."""
    return importlib.import_module(f"pera_bench.suites.{suite}")


def select(names: str) -> list[tuple[str, str]]:
    """(suite, case) of "attention,step/none"; everything that a run has by default for "". Raises UserError."""
    wanted = []
    for name in names.split(",") if names else DEFAULT:
        suite, _, case = name.partition("/")
        if suite not in SUITES:
            raise UserError(f"{name}: no such bench; known: {', '.join(SUITES)}{did_you_mean(suite, SUITES)}")
        cases = load(suite).CASES
        if case and case not in cases:
            hint = did_you_mean(case, cases)
            raise UserError(f"{name}: no such case; {suite} has {', '.join(cases)}{hint}")
        wanted += [(suite, case)] if case else [(suite, one) for one in cases]
    return wanted


def chosen_implementations(named: str | tuple[str, ...], device: torch.device, wanted: str = "") -> list[str]:
    """Implementations of a suite to measure.

    Args:
        named: the suite's IMPLEMENTATIONS.
        wanted: "" for the definition and what would run (of the step also the published one, if there is a checkout);
            "all"; or names, separated by commas, of which those count that the suite has.
    """
    from pera_bench.work import COMPILED, REFERENCE
    from pera_kernels import backend

    if isinstance(named, str):
        with backend.use(REFERENCE):  # then the report lists all others as missing
            registered = next(row.missing for row in backend.report(device) if row.op == named)
        usual, every = [REFERENCE, "chosen"], [REFERENCE, COMPILED, *registered]
    else:
        usual = [REFERENCE, "pera-fast", *(["published"] if os.environ.get("PERA_OFFICIAL") else [])]
        usual, every = [name for name in named if name in usual], list(named)
    if wanted in ("", "all"):
        return every if wanted else usual
    return [name for name in wanted.split(",") if name in (*usual, *every)]


def check_implementations(names: str, suites: Iterable[str], device: str) -> None:
    """Raises UserError for implementations that none of the suites has, or that are left without any on the device."""
    import torch

    from pera_bench.work import COMPILED, REFERENCE

    found = [load(suite).IMPLEMENTATIONS for suite in suites]
    every = {name for one in found for name in chosen_implementations(one, torch.device(device), "all")}
    known = sorted(every | {REFERENCE, COMPILED, "chosen", "native", "triton", "published"})
    for name in names.split(","):
        if name not in known:
            raise UserError(
                f"--only {name}: no such implementation; known: {', '.join(known)}{did_you_mean(name, known)}"
            )
    if not any(chosen_implementations(one, torch.device(device), names) for one in found):
        have = ", ".join(sorted(every))
        raise UserError(f"--only {names}: none of these benches has that on {device}; they have {have}")
