"""A wire between a run and a real server that a test can cut, hold up or take away."""

import contextlib
import socket
import threading
from urllib.parse import urlparse


class Proxy:
    """Passes TCP connections to `target` through. mode: "ok"; "cut" ends a reply after its first bytes; "hang" passes requests
    on and keeps the replies. `down` refuses connections until `up`, on the same port."""

    def __init__(self, target: str):
        parsed = urlparse(target)
        self.target, self.mode, self.replies = (parsed.hostname, parsed.port), "ok", 0
        self.port, self.listener, self.open = 0, None, set()
        self.up()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("127.0.0.1", self.port))
        self.listener.listen(128)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def down(self) -> None:
        _close(self.listener)
        for connection in list(self.open):
            _close(connection)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(self.target)
            self.open |= {client, server}
            threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, reply: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.replies += reply
                if reply and self.mode == "hang":
                    continue
                if reply and self.mode == "cut":
                    sink.sendall(data[: len(data) // 2])
                    break
                sink.sendall(data)
        _close(source), _close(sink)
        self.open -= {source, sink}


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
