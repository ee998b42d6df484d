"""The load tests of this installation."""

from functools import partial

from llmpilot_loadtester.conduct import LoadTestConduct, Surroundings
from llmpilot_loadtester.domain.load_test import LoadTest
from llmpilot_servicekit.jobs.jobs import Jobs

LoadTests = Jobs[LoadTest]


def load_tests_of(around: Surroundings, *, max_count: int, take_over_seconds: float) -> LoadTests:
    """Return the load tests, of which this process takes at most `max_count` at a time."""
    return Jobs(
        around.keeping,
        partial(LoadTestConduct, around),
        max_count=max_count,
        take_over_seconds=take_over_seconds,
        id_field="load_test_id",
    )
