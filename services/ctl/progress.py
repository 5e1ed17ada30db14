"""Progress on standard error: silent for what is quick, one line a step for what takes more than a second."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType


class Progress:
    """`with Progress("starting node") as progress: … progress.step("waiting for ipam")`.

    Nothing is printed in the first second; then the current step, and every later one. On a terminal one
    line is rewritten and erased at the end; elsewhere each step is a line."""

    def __init__(self, what: str, delay: float = 1.0) -> None:
        self._text = what
        self._shown = ""
        self._delay = delay
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._tty = sys.stderr.isatty()
        self._thread = threading.Thread(target=self._tick, daemon=True, name="progress")

    def step(self, text: str) -> None:
        """What is being done or waited for now."""
        with self._lock:
            self._text = text
        if time.monotonic() - self._began >= self._delay:
            self._print()

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        if self._tty and self._shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()

    def _tick(self) -> None:
        wait = self._delay
        while not self._done.wait(wait):
            self._print()
            wait = 1.0

    def _print(self) -> None:
        with self._lock:
            seconds = int(time.monotonic() - self._began)
            if self._tty:
                sys.stderr.write(f"\r\033[K{self._text} … {seconds}s")
            elif self._text != self._shown:
                sys.stderr.write(f"{self._text} …\n")
            self._shown = self._text
            sys.stderr.flush()
