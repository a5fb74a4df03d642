"""The command `python -m tests.data.fuzz`."""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
# The process of the cases imports what this one does; so do the decoders' processes below it.
sys.path[:0] = [str(path) for path in (TESTS.parent, TESTS.parent / "kernels", TESTS / "data", TESTS / "train")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

if __name__ == "__main__":
    from fuzz.run import main

    sys.exit(main())
