"""A probe whose decoders die or hang on files with certain names; else the real one."""

import os
import signal
import sys
import time

from pera_fast.data.decoding.probe import Prober
from pera_fast.data.decoding.worker import serve


class DyingProber(Prober):
    def __call__(self, paths, settings, decoders, say=lambda stage: None):
        for path in paths:
            name = os.path.basename(path)
            for decoder in decoders:
                if f"kills-{decoder}" in name or "kills-all" in name:
                    say(decoder)
                    os.kill(os.getpid(), signal.SIGSEGV)
                if f"hangs-{decoder}" in name:
                    say(decoder)
                    time.sleep(600)
        return super().__call__(paths, settings, decoders, say)


if __name__ == "__main__":
    serve(int(sys.argv[1]), DyingProber())
