"""When programs may be taken off the uplinks."""

from __future__ import annotations

from services.lb.outside import Outside


def test_nobody_is_told_no_before_all_is_known() -> None:
    told: list[bool] = []
    outside = Outside(told.append)
    for number in range(100):
        outside.planned(f"inside/{number}", False)
    assert not told
    outside.planned("web", True)
    outside.planned("inside/0", False)
    assert set(told) == {True}
    # The only one, and others may follow.
    outside.planned("web", False)
    assert set(told) == {True}
    outside.complete()
    assert told[-1] is False
    outside.planned("web", True)
    outside.planned("inside/1", False)
    assert told[-1] is True
    outside.planned("web", False)
    assert told[-1] is False
