"""The worker process of `sandbox.Sandbox`: `python -m pera_fast.data.decoding.worker SOCKET`.

Messages sent: ("ready",), then per call any number of ("stage", text) and one ("done", results). No torch here: the
process must start fast.
"""

import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from pera_fast.data.decoding.probe import Prober


def serve(socket: int, answer: Callable[..., Any]) -> None:
    """Answers calls on a socket until the other end goes: `answer(*message, say)`; `say` tells what it does now."""
    connection = Connection(socket)
    connection.send(("ready",))
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # the decoders' libraries print what they think of each broken file
        os.dup2(quiet, stream)
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(("done", answer(*message, lambda stage: connection.send(("stage", stage)))))


if __name__ == "__main__":
    serve(int(sys.argv[1]), Prober())
