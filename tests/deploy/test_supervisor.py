"""When members start again."""

from deploy.supervisor import Restarts


def _times(restarts: Restarts, ended: float, until: float) -> list[float]:
    """The seconds at which a member that ends at once, each time, is started again."""
    starts, now = [], ended
    while now < until:
        if restarts.is_due("node-0", now):
            starts.append(now)
            restarts.started("node-0", now)
        now += 0.5
    return starts


def test_waits_double_up_to_a_minute_and_never_end() -> None:
    restarts = Restarts()
    restarts.started("node-0", 0.0)
    starts = _times(restarts, 0.0, 400.0)
    waits = [later - earlier for earlier, later in zip([0.0, *starts], starts, strict=False)]
    # Half a second passes until the next look.
    assert [round(wait) for wait in waits[:5]] == [2, 4, 8, 16, 32]
    assert all(60 <= wait <= 61 for wait in waits[5:])
    assert sum(waits) > 300
    assert restarts.counts["node-0"] == len(starts)


def test_one_that_ran_long_starts_again_soon() -> None:
    restarts = Restarts()
    restarts.started("node-0", 0.0)
    _times(restarts, 0.0, 100.0)
    restarts.started("node-0", 100.0)
    assert not restarts.is_due("node-0", 1000.0)
    assert restarts.is_due("node-0", 1002.0)
