"""The tunings of this installation."""

from functools import partial

from llmpilot_servicekit.jobs.jobs import Jobs
from llmpilot_tuner.conduct import Surroundings, TuningConduct
from llmpilot_tuner.domain.tuning import Tuning

Tunings = Jobs[Tuning]


def tunings_of(around: Surroundings, *, max_count: int, take_over_seconds: float) -> Tunings:
    """Return the tunings, of which this process takes at most `max_count` at a time."""
    return Jobs(
        around.keeping,
        partial(TuningConduct, around),
        max_count=max_count,
        take_over_seconds=take_over_seconds,
        id_field="tuning_id",
    )
