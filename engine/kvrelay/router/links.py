"""Which prefill workers can write to which decode workers, and the handshakes under way."""

from collections.abc import Callable

from kvrelay.errors import ERRORS, KVRelayError, WorkerFailed
from kvrelay.types import WorkerId
from kvrelay.wire import Connect, Connected, Descriptor, Message

Link = tuple[WorkerId, WorkerId]  # (prefill, decode)


class Links:
    """Connects pairs; a pair once connected stays so."""

    def __init__(
        self, send: Callable[[WorkerId, Message], None], descriptor_of: Callable[[WorkerId], Descriptor]
    ) -> None:
        self._send, self._descriptor_of = send, descriptor_of
        self._begun_s: dict[Link, float] = {}
        self.connected: set[Link] = set()

    @property
    def num_open(self) -> int:
        """Handshakes without an answer yet."""
        return len(self._begun_s)

    def connect(self, link: Link, now_s: float) -> None:
        """Have the pair shake hands."""
        self._begun_s[link] = now_s
        prefill, decode = link
        self._send(prefill, Connect(peer=self._descriptor_of(decode)))

    def on_connected(self, message: Connected, now_s: float) -> tuple[Link, float, KVRelayError | None]:
        """A handshake ended: the pair, the seconds it took, and the error if it failed."""
        link = (message.worker_id, message.peer)
        seconds = now_s - self._begun_s.pop(link, now_s)
        if not message.error:
            self.connected.add(link)
            return link, seconds, None
        name, _, text = message.error.partition(": ")
        return link, seconds, ERRORS.get(name, WorkerFailed)(text)
