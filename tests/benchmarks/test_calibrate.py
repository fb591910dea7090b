"""The steps of a calibration: each ratio starts gather where that loses least time."""

from benchmarks.calibrate import Sample, samples, steps


def test_steps_lose_least_time_and_fall():
    found = [
        Sample(1.5, 1, 2.0), Sample(1.5, 16, 1.2),
        Sample(4.0, 1, 1.5), Sample(4.0, 4, 0.8), Sample(4.0, 16, 1.1), Sample(4.0, 32, 0.5),
        # No better than the step before, and so not named.
        Sample(6.0, 1, 1.5), Sample(6.0, 4, 0.8),
        Sample(12.0, 1, 0.9), Sample(12.0, 4, 0.5),
    ]  # fmt: skip
    assert steps(found) == [(4.0, 4), (12.0, 1)]
    assert steps(found[:2]) == []


def test_samples_name_their_ratio():
    asked = []

    def over_masked(strategy, problem, rounds):
        asked.append((strategy, problem.x.shape, rounds))
        return 0.5

    found = list(samples(over_masked, 3, small=True))
    assert found == [
        Sample(1.5, 1, 0.5),
        Sample(1.5, 4, 0.5),
        Sample(4.0, 1, 0.5),
        Sample(4.0, 4, 0.5),
    ]
    assert asked[1] == ("gather", (32, 4, 32), 3)
