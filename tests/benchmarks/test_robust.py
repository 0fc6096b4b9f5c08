"""The benchmark of robust aggregation: an attack that turns the mean, and a rule that withstands it."""

from benchmarks.robust.__main__ import ATTACKS, FEDERATION, MALICIOUS, ON_UPDATES, federate
from tofu.settings import Settings


def test_a_sign_flip_stops_the_mean_and_not_the_median() -> None:
    settings = Settings.of(FEDERATION | {"rounds": 8, "batch_size": 16})
    found = {rule: federate(rule, "sign flip", settings)["accuracy"] for rule in ("mean", "median")}
    assert found["mean"] < 0.4 < 0.6 < found["median"]


def test_a_backdoor_is_learned_from_the_mean() -> None:
    found = federate("mean", "boosted backdoor", Settings.of(FEDERATION | {"rounds": 8, "batch_size": 16}))
    assert found["backdoor"] > 0.5
    assert set(ON_UPDATES) < set(ATTACKS)
    assert FEDERATION["clients"] / 2 > MALICIOUS
