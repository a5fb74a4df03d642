"""Selects the suites, cases and implementations of a run."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

from pera_bench.suites import SUITES
from pera_bench.work import COMPILED, REFERENCE
from pera_fast.errors import UserError
from pera_kernels import backend

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
            raise UserError(f"{name}: no such bench; known: {', '.join(SUITES)}")
        cases = load(suite).CASES
        if case and case not in cases:
            raise UserError(f"{name}: no such case; {suite} has {', '.join(cases)}")
        wanted += [(suite, case)] if case else [(suite, one) for one in cases]
    return wanted


def chosen_implementations(named: str | tuple[str, ...], device: torch.device, wanted: str = "") -> list[str]:
    """Implementations of a suite to measure.

    Args:
        named: the suite's IMPLEMENTATIONS.
        wanted: "" for the definition and what would run (of the step also the published one, if there is a checkout);
            "all"; or names, separated by commas, of which those count that the suite has.
    """
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
