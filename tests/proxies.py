"""A way to a Postgres server that can be cut, or come to a stop."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

import pytest
from sqlalchemy import URL, make_url


class Proxy:
    """Before the server's local socket.

    Attributes:
        url: The way through it.
        cuts_answers: Drop the server's next answer, and all connections from then on.
    """

    def __init__(self, url: str) -> None:
        made = make_url(url)
        folder = made.query.get("host") or made.host
        if not folder or not str(folder).startswith("/"):
            pytest.skip("the server given has no local socket")
        self._target = f"{folder}/.s.PGSQL.{made.port or 5432}"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url: URL = made.set(host="127.0.0.1", port=self._listener.getsockname()[1], query={"sslmode": "disable"})
        self.cuts_answers = False
        self._left: int | None = None
        self._stopped = threading.Event()
        self._goes_on = threading.Event()
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def stop_after(self, count: int) -> None:
        """Let so many bytes more through to the server."""
        self._left = count

    def has_stopped(self) -> bool:
        """Wait until it lets nothing more through."""
        return self._stopped.wait(20)

    def cut(self) -> None:
        """Drop the connections that there are; others may come."""
        for each in self._sockets.copy():  # whoever is cut off comes back at once
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def go_on(self) -> None:
        """Let everything through, what was held back as well."""
        self._left = None
        self._goes_on.set()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.cuts_answers:
                client.close()
                continue
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._target)
            self._sockets += [client, server]
            threading.Thread(target=self._ask, args=(client, server), daemon=True).start()
            threading.Thread(target=self._answer, args=(server, client), daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        try:
            while data := client.recv(65536):
                if self._left is not None:
                    first, data = data[: self._left], data[self._left :]
                    self._left -= len(first)
                    server.sendall(first)
                    if data:
                        self._stopped.set()
                        self._goes_on.wait()
                server.sendall(data)
            server.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        try:
            while data := server.recv(65536):
                if self.cuts_answers:
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        """No way any more."""
        self.go_on()
        self._listener.close()
        for each in self._sockets:
            each.close()
