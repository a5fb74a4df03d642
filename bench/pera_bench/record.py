"""Records of finished measurements: machine, ceilings, rows and omissions; reading, writing, comparing two."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pera_fast.errors import UserError

KEY = ("suite", "case", "direction", "implementation", "recipe", "images", "precision")
REFERENCE = "reference"
LATER_PASS = ", pass "  # in the name of a bench that is measured again


@dataclass
class Record:
    """Record that `pera-fast bench` writes.

    Attributes:
        machine: see `machine.describe`.
        ceilings: bytes/s of a large copy ("copy"), FLOP/s of large products ("matrix").
        rows: see `measure.Measure`, `test_suites` and `summarise`; times in seconds.
        skipped, failed: [{"bench", "reason"}].
        benches: how many there were to do, in all passes.
    """

    machine: dict[str, Any]
    ceilings: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    benches: int = 0

    def save(self, path: Path) -> None:
        """Writes the JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Record:
        """Reads a file that `save` wrote. Raises UserError."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); give a file that --json wrote") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: is not a file that pera-fast bench --json wrote") from error

    @classmethod
    def from_lines(cls, text: str) -> Record | None:
        """Read what the runner has written so far; None before it has begun. An incomplete last line is left out."""
        record, measured = None, []
        for line in text.splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            entry = json.loads(line)
            if record is None:
                record = cls(**entry)
            elif "row" in entry:
                measured.append(entry["row"])
            elif "benches" in entry:
                record.benches = entry["benches"]
            else:
                (what,) = entry.keys() - {"reason"}
                reasons = record.skipped if what == "skipped" else record.failed
                if LATER_PASS not in entry[what] or what == "failed":
                    reasons.append({"bench": entry[what], "reason": entry["reason"]})
        if record is not None:
            record.rows = summarise(measured, record.ceilings)
            record.add_speedups()
        return record

    @property
    def undisturbed(self) -> float:
        """Share of the time in which a bench's own thread ran, the median over the benches; 1 on a GPU.

        A call that computes on a CPU keeps its thread busy; what is missing other processes took. The loader waits for
        threads of its own and does not count.
        """
        shares = [row["busy"] for row in self.rows if row["busy"] is not None and row["suite"] != "data"]
        return statistics.median(shares) if shares else 1.0

    def add_speedups(self) -> None:
        """Gives each row "speedup": the reference's median over its own, at the same point."""
        reference = {_key(row): row["median_s"] for row in self.rows if row["implementation"] == REFERENCE}
        for row in self.rows:
            row["speedup"] = None
            if (base := reference.get(_key({**row, "implementation": REFERENCE}))) is not None:
                row["speedup"] = base / row["median_s"]


def summarise(measured: list[dict[str, Any]], ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """One row a bench from one a bench and pass, in the order of the first pass.

    A row has the median, quartiles and extremes of the calls of all passes together, how many these were ("rounds"),
    the median of each pass ("passes_s"), and the shares of the ceilings; that of products ("of_matrix") is of the rate
    between the calls ("matrix_meanwhile") where that was measured.
    """
    passes: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in measured:
        passes.setdefault(_key({**row, "implementation": row["asked"]}), []).append(row)
    rows = []
    for first, *later in passes.values():
        each = [row["times_s"] for row in (first, *later)]
        times = sorted(seconds for some in each for seconds in some)
        q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        row = {"peak_mib": None, "error": None}  # where the first pass, which measures them, did not come through
        row |= {k: v for k, v in first.items() if k not in ("asked", "pass", "times_s", "moved_bytes", "flops")}
        row |= {"median_s": median, "q1_s": q1, "q3_s": q3, "min_s": times[0], "max_s": times[-1]}
        row |= {"rounds": len(times), "passes_s": [statistics.median(some) for some in each]}
        for cost, share, ceiling in (("moved_bytes", "of_copy", "copy"), ("flops", "of_matrix", "matrix")):
            if first[cost]:
                row |= {cost: first[cost], share: first[cost] / median / ceilings[ceiling]}
        rates = [some["matrix_meanwhile"] for some in (first, *later) if "matrix_meanwhile" in some]
        if rates and first["flops"]:  # means of both: what others took of the machine, they took of both
            row["matrix_meanwhile"] = statistics.harmonic_mean(rates)
            row["of_matrix"] = first["flops"] / statistics.mean(times) / row["matrix_meanwhile"]
        rows.append(row)
    return rows


def spread(row: dict[str, Any]) -> float:
    """Seconds: the interquartile range of the calls, or the distance of the passes from each other if that is more.

    Calls that follow each other meet the same state of the machine; passes minutes apart do not.
    """
    passes = row.get("passes_s", [0.0])
    return max(row["q3_s"] - row["q1_s"], max(passes) - min(passes))


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


@dataclass(frozen=True)
class Change:
    """A bench that two records have."""

    row: dict[str, Any]
    old: dict[str, Any]

    @property
    def ratio(self) -> float:
        """New over old median: below 1 it became faster."""
        return self.row["median_s"] / self.old["median_s"]

    @property
    def moved(self) -> bool:
        """Whether the medians lie further apart than the two spreads together."""
        return abs(self.row["median_s"] - self.old["median_s"]) > spread(self.row) + spread(self.old)


def compare(new: Record, old: Record) -> list[Change]:
    """The benches that both have, in the order of the new one."""
    before = {_key(row): row for row in old.rows}
    return [Change(row, before[_key(row)]) for row in new.rows if _key(row) in before]
