"""The byte for each hash of an address that tells programs what the address may be (LB_HINT)."""

from __future__ import annotations

from array import array
from typing import Final

from services.common.kernel.lines import Lines
from services.lb import abi

_PLACE: Final = {int(bit): number for number, bit in enumerate(abi.Hint)}


class Hints:
    """Counts who wants a bit; a bit that nobody wants is taken away. Addresses are struct fib_addr."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._wanted = [array("I", bytes(4 * abi.HINTS)) for _ in abi.Hint]

    def add(self, address: bytes, bit: int) -> None:
        at = abi.hint_at(address)
        self._wanted[_PLACE[bit]][at] += 1
        self._lines.mem[at] |= bit

    def remove(self, address: bytes, bit: int) -> None:
        """Once for each `add`."""
        at, wanted = abi.hint_at(address), self._wanted[_PLACE[bit]]
        if wanted[at] > 1:
            wanted[at] -= 1
        else:
            wanted[at] = 0
            self._lines.mem[at] &= ~bit & 0xFF

    def sweep(self) -> int:
        """Take away all bits that nobody wants, which an earlier process may have left, and set those that are missing;
        how many bytes were wrong.
        """
        # As long numbers, a byte each place: a loop over all of them would take its time.
        bits = (
            int.from_bytes(bytes(map(bool, wanted)), "little") * bit.value
            for bit, wanted in zip(abi.Hint, self._wanted, strict=True)
        )
        due = sum(bits).to_bytes(abi.HINTS, "little")
        there = self._lines.mem[: abi.HINTS]
        if there == due:
            return 0
        wrong = [at for at, (is_, wants) in enumerate(zip(there, due, strict=True)) if is_ != wants]
        for at in wrong:
            self._lines.mem[at] = due[at]
        return len(wrong)
