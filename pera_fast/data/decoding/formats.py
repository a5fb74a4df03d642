"""Tells the format of a file by its suffix and by its first bytes."""

import os

from pera_fast.errors import UserError

SUFFIXES = (
    frozenset(("jpg", "jpeg", "jpe", "jfif", "png", "tif", "tiff", "btf", "webp", "bmp", "dib", "gif", "tga", "ico"))
    | frozenset(("jp2", "j2k", "j2c", "jpc", "jpx", "jpf"))
    | frozenset(("pbm", "pgm", "ppm", "pnm", "pam"))
)
HEAD_BYTES = 64  # of a file that `sniff` looks at

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)
_SPACE = b" \t\r\n#"


def has_image_suffix(name: str) -> bool:
    """Whether a file's name says that it is an image."""
    _, dot, suffix = name.rpartition(".")
    return bool(dot) and suffix.lower() in SUFFIXES


def refuse_virtual(what: str, path: str | os.PathLike[str]) -> None:
    """Raises UserError for a path that only GDAL could open; `what` says whose it is."""
    if os.fspath(path).startswith("/vsi"):
        raise UserError(
            f"{what} {path}: is a virtual path of GDAL, which is not read; copy or mount the files, give their folder"
        )


def sniff(head: bytes) -> str | None:
    """The image format that a file's first bytes (HEAD_BYTES of them) tell, or None."""
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(_TIFF):
        return "tiff"
    if b"<VRTDataset" in head:
        return "vrt"  # an XML file of GDAL that refers to other files; refused, see `probe`
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith(b"\0\0\0\x0cjP  \r\n\x87\n") or head.startswith(b"\xff\x4f\xff\x51"):
        return "jpeg2000"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    # Two letters are not much: what follows must fit too.
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "bmp"
    if len(head) > 3 and head[:1] == b"P" and head[1:2] in b"123456" and head[2:3] in _SPACE:
        return "pnm"
    return None
