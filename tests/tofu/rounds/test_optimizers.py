from hypothesis import given
from hypothesis import strategies as st

from tofu.rounds.optimizers import MAX_STEP, automatic_step

ROUNDS = st.integers(1, 1000).flatmap(lambda rounds: st.tuples(st.integers(1, rounds), st.just(rounds)))


@given(st.floats(0, allow_nan=False), ROUNDS)
def test_the_automatic_step_ends_at_one_and_has_a_limit(diversity: float, place: tuple[int, int]) -> None:
    round_, rounds = place
    step = automatic_step(diversity, round_, rounds)
    assert 1 <= step <= MAX_STEP
    assert 256 * step == int(256 * step)
    if round_ == rounds or diversity <= 2:
        assert step == 1
    if round_ < rounds:
        assert automatic_step(diversity, round_ + 1, rounds) <= step <= automatic_step(2 * diversity, round_, rounds)


def test_the_first_of_many_rounds_has_half_of_the_diversity() -> None:
    assert automatic_step(5.0, 1, 10) == 2.5
