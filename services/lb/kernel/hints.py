"""The byte for each hash of an address that tells programs what the address may be (LB_HINT)."""

from __future__ import annotations

from collections import Counter

from services.common.kernel.lines import Lines
from services.common.pipeline.abi import IPAddress
from services.lb import abi


class Hints:
    """Counts who wants a bit; a bit that nobody wants is taken away."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._wanted: Counter[tuple[int, abi.Hint]] = Counter()

    def add(self, address: IPAddress, bit: abi.Hint) -> None:
        at = abi.hint_of(address)
        self._wanted[at, bit] += 1
        self._lines.mem[at] |= bit

    def remove(self, address: IPAddress, bit: abi.Hint) -> None:
        """Once for each `add`."""
        key = abi.hint_of(address), bit
        self._wanted[key] -= 1
        if self._wanted[key] <= 0:
            del self._wanted[key]
            self._lines.mem[key[0]] &= ~bit & 0xFF

    def sweep(self) -> int:
        """Take away all bits that nobody wants, which an earlier process may have left, and set those that are missing;
        how many bytes were wrong.
        """
        wanted = bytearray(abi.HINTS)
        for at, bit in self._wanted:
            wanted[at] |= bit
        there = self._lines.mem[: abi.HINTS]
        if there == wanted:
            return 0
        wrong = [at for at, (is_, due) in enumerate(zip(there, wanted, strict=True)) if is_ != due]
        for at in wrong:
            self._lines.mem[at] = wanted[at]
        return len(wrong)
