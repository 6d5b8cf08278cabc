"""The timing harness, on a clock of its own."""

from collections.abc import Callable

import pytest

from timm_deconv.timing import Spread, Timings, interleave


class FakeClock:
    """Time passes only when an action says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def action(self, *durations: float) -> Callable[[], None]:
        """Takes the given seconds, call by call; the last one from then on."""
        remaining = list(durations)

        def act() -> None:
            self.now += remaining.pop(0) if len(remaining) > 1 else remaining[0]

        return act


def test_medians_and_quartiles_are_of_the_rounds_after_warm_up() -> None:
    clock = FakeClock()
    timings = interleave({"a": clock.action(100, 1, 2, 3, 4, 5)}, rounds=5, warmup=1, clock=clock)
    assert list(timings.seconds["a"]) == [1, 2, 3, 4, 5]
    assert timings.spread("a") == Spread(median=3, lower=2, upper=4)


def test_ratios_are_taken_round_by_round() -> None:
    timings = Timings({"slow": [2.0, 40.0, 6.0], "fast": [1.0, 20.0, 3.0]})
    assert timings.ratio("slow", "fast") == Spread(2.0, 2.0, 2.0)


def test_every_round_times_every_action_once_in_changing_order() -> None:
    calls: list[str] = []
    actions = {label: (lambda label=label: calls.append(label)) for label in "abcd"}
    interleave(actions, rounds=8, warmup=2)
    turns = [tuple(calls[i : i + 4]) for i in range(0, len(calls), 4)]
    assert len(turns) == 10
    assert all(sorted(turn) == ["a", "b", "c", "d"] for turn in turns)
    assert len(set(turns)) > 1


def test_the_device_is_waited_for_on_both_sides_of_the_clock() -> None:
    events: list[str] = []
    clock = FakeClock()

    def read() -> float:
        events.append("clock")
        return clock()

    synchronise = lambda: events.append("wait")  # noqa: E731
    interleave({"a": lambda: events.append("a")}, rounds=1, warmup=0, synchronise=synchronise, clock=read)
    assert events == ["wait", "clock", "a", "wait", "clock"]


def test_one_measurement_is_its_own_spread() -> None:
    assert Spread.of([0.5]) == Spread(0.5, 0.5, 0.5)


@pytest.mark.parametrize(("count", "rounds", "warmup"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_nothing_to_time_is_an_error(count: int, rounds: int, warmup: int) -> None:
    with pytest.raises(ValueError, match=f"rounds={rounds}"):
        interleave(dict.fromkeys("ab"[:count], lambda: None), rounds=rounds, warmup=warmup)
