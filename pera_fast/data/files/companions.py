"""Tells companions of images (overviews, masks, thumbnails) and hidden or trash folders from the images themselves."""

import re
from collections import Counter

_SUFFIXES = (".ovr", ".msk", ".aux", ".aux.xml", ".rrd")  # of GDAL: overviews, mask, statistics of the file beside it
_THUMBNAIL = re.compile(r"((.*[-_.])?(thumb|thumbs|thumbnail|quicklook|browse|qlk?)([-_](small|large))?|preview)")
_FOLDERS = ("$recycle.bin", "system volume information", "__macosx", "lost+found", "@eadir", "#recycle", "#snapshot")
FOLDERS = "hidden or trash folders"


def companion(name: str) -> str | None:
    """Kind of companion that a file is by its name, such as ".ovr" or "thumbnails"; None: it may be an image."""
    lower = name.lower()
    if lower.startswith("."):
        return "hidden files"
    for suffix in _SUFFIXES:
        if lower.endswith(suffix):
            return suffix
    return "thumbnails" if _THUMBNAIL.fullmatch(lower.partition(".")[0]) else None


def hides(name: str) -> bool:
    """Whether nothing in a folder of this name is an image: hidden, trash, notebooks' copies, what systems keep."""
    return (name.startswith(".") and name.strip(".") != "") or name.lower() in _FOLDERS  # .. is refused elsewhere


def path_companion(path: str) -> str | None:
    """`companion` of a path below the data folder; FOLDERS if it lies in a folder that `hides`."""
    *folders, name = path.split("/")
    return FOLDERS if any(map(hides, folders)) else companion(name)


def not_taken(left_out: Counter[str]) -> str:
    """Says what was left out, and how to take it; empty where nothing was."""
    if not left_out:
        return ""
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
    return f"not taken as images: {told} (data.companions=true, or --companions, takes them)"
