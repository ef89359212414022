"""Tests of greensafe.sansio.backoff."""

from __future__ import annotations

from hypothesis import given, strategies as st

from greensafe.sansio.backoff import FIRST, JITTER, LONGEST, PERIOD, RESERVE, RESTARTS, SHARE, Budget, Intensity, delay


def test_delays_double() -> None:
    """50, 100, 200 ms ... and never more than 2 s, however many tries have failed."""
    assert [delay(tries, 0.0) for tries in range(1, 8)] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0]
    assert delay(10**9, 0.0) == LONGEST


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_jitter(tries: int, chance: float) -> None:
    """Chance takes away up to half of a delay; there is always some left."""
    longest = delay(tries, 0.0)
    assert longest * (1 - JITTER) <= delay(tries, chance) <= longest
    assert delay(tries, chance) >= FIRST * (1 - JITTER)


def test_a_reserve_and_a_share() -> None:
    """Ten retries at first; then one for ten requests. What is not used does not pile up beyond the ten."""
    budget = Budget()
    assert [budget.spend() for _ in range(11)] == [True] * 10 + [False]
    retries = 0
    for _ in range(1000):
        budget.earn()
        retries += budget.spend()
    assert 99 <= retries <= 100
    for _ in range(10**4):
        budget.earn()
    assert sum(budget.spend() for _ in range(100)) == RESERVE


@given(st.lists(st.booleans(), max_size=500))
def test_never_more_than_the_share(requests: list[bool]) -> None:
    """Whatever the order of requests and failures, retries stay a share of the requests and the reserve."""
    budget = Budget()
    earned = spent = 0
    for is_request in requests:
        if is_request:
            budget.earn()
            earned += 1
        else:
            spent += budget.spend()
        assert spent <= RESERVE + SHARE * earned + 1e-6


def test_three_restarts_and_no_more() -> None:
    """Three that follow one another wait longer each time, the fourth failure within five seconds is one too many."""
    intensity = Intensity()
    assert [intensity.restart(100.0 + number, 0.0) for number in range(4)] == [0.05, 0.1, 0.2, None]
    assert intensity.restart(100.0 + PERIOD, 0.0) == 0.2  # the first is forgotten, two are not
    assert intensity.restart(200.0, 0.0) == 0.05


@given(st.lists(st.tuples(st.floats(0, PERIOD), st.floats(0, 1)), max_size=100))
def test_restarts_are_bounded(failures: list[tuple[float, float]]) -> None:
    """Whatever the times: one is refused if, and only if, three are within its period; none is at once."""
    intensity, now = Intensity(), 0.0
    restarts: list[float] = []
    for after, chance in failures:
        now += after
        recent = [at for at in restarts if now - at < PERIOD]
        pause = intensity.restart(now, chance)
        assert (pause is None) is (len(recent) >= RESTARTS)
        if pause is not None:
            restarts.append(now)
            assert FIRST * (1 - JITTER) <= pause <= FIRST * 2 ** len(recent)


@given(st.floats(0, 1e9), st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_what_fails_seldom_is_always_started_again(now: float, chances: list[float]) -> None:
    """A failure that comes a period after the one before is the first again."""
    intensity = Intensity()
    for number, chance in enumerate(chances):
        assert intensity.restart(now + 2 * number * PERIOD, chance) == delay(1, chance)
