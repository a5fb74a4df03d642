"""Runs cases of all targets in turns, keeps count of them, and keeps the files of those that found something."""

import argparse
import json
import re
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fuzz.targets import TARGETS
from pera_fast.data.decoding.worker_process import DiedError, WorkerProcess
from pera_fast.durable import whole_file

_TURN = 4.0  # seconds of a target, then the next one
_HANG = 60.0  # seconds of a case
_KEPT_BYTES = 2**20  # of a case's files
_KEPT_CASES = 3  # of equal findings


@dataclass
class State:
    """Counts of a seed, kept in a file from which the next call goes on."""

    seed: int
    seconds: float = 0.0
    next: dict[str, int] = field(default_factory=dict)  # number of each target's next case
    outcomes: dict[str, dict[str, int]] = field(default_factory=dict)
    found: dict[str, list[str]] = field(default_factory=dict)  # what: the cases TARGET:NUMBER that found it

    @classmethod
    def load(cls, path: Path, seed: int) -> "State":
        if not path.exists():
            return cls(seed)
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def save(self, path: Path) -> None:
        with whole_file(path) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


class Fuzzer:
    """Cases in a process that is started anew when it died.

    Args:
        keep: folder for the state and for what is found.
        state: counts so far.
    """

    def __init__(self, keep: Path, state: State):
        self.keep, self.state = keep, state
        self._folder = Path(tempfile.mkdtemp(prefix="pera-fuzz-"))
        self._worker = WorkerProcess("fuzz.case_worker", _HANG)

    def close(self) -> None:
        self._worker.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, name: str, number: int) -> str:
        """One case; returns what it found, or nothing."""
        try:
            outcome, found = self._worker.call((str(self._folder), name, self.state.seed, number))
        except DiedError as died:
            outcome, found = "FOUND", f"the process {died}"
        counts = Counter(self.state.outcomes.get(name, {}))
        counts.update(outcome.split())
        self.state.outcomes[name] = dict(counts)
        if found:
            self._report(name, number, found)
        return found

    def turn(self, name: str, until: float) -> None:
        """Cases of one target until then, at least one."""
        while True:
            number = self.state.next.get(name, 0)
            self.run(name, number)
            self.state.next[name] = number + 1
            if time.monotonic() >= until:
                return

    def _report(self, name: str, number: int, found: str) -> None:
        cases = self.state.found.setdefault(_kind(found), [])
        cases.append(f"{name}:{number}")
        if len(cases) > _KEPT_CASES:
            return
        place = self.keep / f"found-{self.state.seed}" / f"{name}-{number}"
        files = [path for path in (self._folder / name / "case").rglob("*") if path.is_file()]
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        (place / "what.txt").write_text(found + "\n", encoding="utf-8", errors="backslashreplace")
        if sum(path.stat().st_size for path in files) <= _KEPT_BYTES:
            shutil.copytree(self._folder / name / "case", place / "case")
        print(f"FOUND {name}:{number}: {found.splitlines()[0]} ({place})", flush=True)


def _kind(found: str) -> str:
    """What equal findings have in common: the error without its numbers and names, and where it was raised."""
    first, *rest = found.splitlines()
    if not first.startswith("FoundError"):
        first = first.partition(":")[0]  # what it says is about the place in the file
    first = re.sub(r"'.*'|\".*\"", "'...'", re.sub(r"/\S+", "PATH", first))
    raised = [line.strip() for line in rest if line.lstrip().startswith("File ")][-1:]
    where = re.sub(r'File ".*?([^/]+)", line (\d+), in (.*)', r"\1:\2 \3", raised[0]) if raised else ""
    return f"{re.sub(r'[0-9]+', 'N', first)[:150]} [{where}]"


def main(arguments: list[str] | None = None) -> int:
    """Parses a command line and runs it; 1 if anything was found."""
    parser = argparse.ArgumentParser(
        "python -m tests.data.fuzz", description="Mutated files of every kind, for a while."
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="minutes to run")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other mutations")
    parser.add_argument("--state", type=Path, default=Path("build/fuzz"), help="folder for counts and findings")
    parser.add_argument("--only", action="append", choices=list(TARGETS), help="a target; may be repeated")
    parser.add_argument("--case", metavar="TARGET:NUMBER", help="run one case again, in this process")
    options = parser.parse_args(arguments)
    options.state.mkdir(parents=True, exist_ok=True)
    if options.case:
        return _again(options.case, options.seed, options.state)
    path = options.state / f"seed-{options.seed}.json"
    state = State.load(path, options.seed)
    before = len(state.found)
    fuzzer = Fuzzer(options.state, state)
    began = time.monotonic()
    end, names = began + options.minutes * 60, options.only or list(TARGETS)
    already, turn = state.seconds, 0
    try:
        while (now := time.monotonic()) < end or turn < len(names):
            fuzzer.turn(names[turn % len(names)], min(now + _TURN, max(end, now)))
            turn += 1
            state.seconds = already + time.monotonic() - began
            state.save(path)
    except KeyboardInterrupt:
        pass
    finally:
        state.save(path)
        fuzzer.close()
    print(report(state))
    return 1 if len(state.found) > before else 0


def report(state: State) -> str:
    """What was tried and what came of it, a line a target."""
    cases = sum(state.next.values())
    lines = [f"seed {state.seed}: {cases} cases in {state.seconds / 60:.1f} minutes, {len(state.found)} found"]
    for name, target in TARGETS.items():
        told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(state.outcomes.get(name, {}).items()))
        lines.append(f"{name} ({target.covers}): {state.next.get(name, 0)} cases: {told}")
    return "\n".join(
        [*lines, *(f"found {len(cases)} times, {cases[0]}: {what}" for what, cases in state.found.items())]
    )


def _again(case: str, seed: int, keep: Path) -> int:
    """One case in this process, so that a debugger or a traceback can tell."""
    from fuzz.case_worker import case_rng

    name, _, number = case.partition(":")
    target = TARGETS[name](keep / "again" / name)
    print(target.run(case_rng(seed, name, int(number))))
    return 0
