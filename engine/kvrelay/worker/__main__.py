"""Entry of a worker process: settings arrive as one JSON line on standard input.

The pipe then stays open for as long as the parent lives: its end means that the parent is gone, however it
went, and the worker leaves at once, taking the run directory with it.
"""

import os
import shutil
import signal
import sys
import threading

import msgspec

from kvrelay.config import WorkerConfig
from kvrelay.errors import KVRelayError


def main() -> int:
    """Serve until the router or the parent's end says stop; 1 when the start failed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=WorkerConfig)
    threading.Thread(target=_leave_with_parent, args=(config.run_directory,), daemon=True).start()
    from kvrelay.worker.loop import serve

    try:
        serve(config)
    except KVRelayError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _leave_with_parent(run_directory: str) -> None:
    while os.read(0, 4096):  # not through sys.stdin: its lock would trouble a normal exit
        pass
    shutil.rmtree(run_directory, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
