"""Counts the CPU cores that this process may use, by its affinity and its cgroup's quota."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def default_workers(most: int | None = None) -> int:
    """Number of processes or threads to take where nobody gave one: one for each whole core.

    Args:
        most: an upper limit.
    """
    cores = max(1, int(usable_cores()))
    return cores if most is None else min(cores, most)


def usable_cores(cgroups: Path | None = None, membership: Path | None = None) -> float:
    """Number of cores that this process can use; a quota of 150 % is 1.5.

    Args:
        cgroups: where the control groups are mounted; None: Linux's place.
        membership: the file that names this process's groups; None: Linux's place.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    allowed = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min([float(allowed), *_quotas(cgroups or _CGROUPS, membership or _MEMBERSHIP)])


def _quotas(cgroups: Path, membership: Path) -> Iterator[float]:
    """Quotas of this process's groups and of those around them, of cgroup v2 and v1."""
    for line in _read(membership).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, place = rest.partition(":")
        if controllers == "":
            yield from _along(cgroups, place, _quota_v2)
        elif "cpu" in controllers.split(","):
            for mount in (cgroups / controllers, cgroups / "cpu"):
                yield from _along(mount, place, _quota_v1)


def _along(mount: Path, place: str, quota: Callable[[Path], float | None]) -> Iterator[float]:
    """The quota of each group from `place` up to the mount; a container may see its own group as the mount."""
    group = mount / place.strip("/")
    for folder in (group, *group.parents):
        if mount in (folder, *folder.parents) and (found := quota(folder)) is not None:
            yield found


def _quota_v2(folder: Path) -> float | None:
    limit, _, period = _read(folder / "cpu.max").partition(" ")
    return _share(limit, period)


def _quota_v1(folder: Path) -> float | None:
    return _share(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _share(limit: str, period: str) -> float | None:
    try:
        quota, length = int(limit), int(period)
    except ValueError:  # "max", or there is no such file
        return None
    return quota / length if quota > 0 and length > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
