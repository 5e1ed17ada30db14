"""Making very many objects that stay, without the garbage collector looking through them again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def keeping() -> Iterator[None]:
    """What is made within is never looked through, neither now nor later: of a million objects that would take a second, in
    which nobody else has a turn. They are freed as ever when nobody refers to them; only circles among them stay for good.
    For work that is sure to end soon.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
