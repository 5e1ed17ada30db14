"""Traffic that notices every lost packet and every failed connection."""

from __future__ import annotations

import socket
import threading

from tests.e2e.endpoints.podkit import Pod, tcp_echo

PORT = 4711


class Probes:
    """New TCP connections at 100 a second and a datagram every 2 ms, until stopped; counts what fails."""

    def __init__(self, client: Pod, server: Pod) -> None:
        self.connections = self.datagrams = 0
        self.failures: list[str] = []
        self._client, self._server = client, server
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=target) for target in (self._connect, self._datagram)]

    def __enter__(self) -> Probes:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _connect(self) -> None:
        version = 4
        while not self._stop.wait(0.01):
            try:
                tcp_echo(self._client.space, version, self._server.address(version), PORT)
                self.connections += 1
            except OSError as error:
                self.failures.append(f"connection over IPv{version}: {error}")
            version = 10 - version

    def _datagram(self) -> None:
        with self._client.space.socket(4, socket.SOCK_DGRAM) as udp:
            udp.connect((self._server.address(4), PORT))
            while not self._stop.wait(0.002):
                wanted = b"%d" % self.datagrams
                try:
                    udp.send(wanted)
                    while udp.recv(100) != wanted:
                        pass
                except OSError as error:
                    self.failures.append(f"datagram: {error}")
                self.datagrams += 1
