"""A file descriptor that another thread can make readable, to end a poll early."""

import socket


class Wakeup:
    """Makes a file descriptor readable from another thread."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._reader.fileno()

    def set(self) -> None:
        """Make it readable; a full buffer means that it already is."""
        try:
            self._writer.send(b"x")
        except (BlockingIOError, OSError):
            return

    def clear(self) -> None:
        """Make it unreadable again."""
        try:
            while self._reader.recv(4096):
                pass
        except (BlockingIOError, OSError):
            return

    def close(self) -> None:
        """Close both ends."""
        self._reader.close()
        self._writer.close()
