"""How far simulated load tests are from measured ones that the constants were not fitted on.

Invariant: a level of users is either fitted on or tested on, never both; levels in which requests failed are neither.
The largest batch weight is a setting of the server that the raw records do not state: it is read off all of its load
tests.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import numpy as np

from llmpilot_perfmodel.steps.calibration import StepPrior, fit_steps
from llmpilot_perfmodel.steps.iterations import ServerSteps, largest_batch_weight, rebuild_steps
from llmpilot_perfmodel.steps.step_time import StepConstants
from llmpilot_recommender.calibration_source import LoadTest
from llmpilot_recommender.measured_llms import load_measured_llms
from llmpilot_recommender.replay import FixedList, Latencies, measured, replayed, withheld_first_tokens
from llmpilot_recommender.step_calibration import CLEAN_ERROR_RATE

METRICS = tuple(field.name for field in fields(Latencies))


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredServer:
    """The load tests of one LLM on one GPU profile, by users, and the steps rebuilt from them."""

    llm: str
    gpu_profile: str
    is_padded: bool
    tests: Mapping[int, LoadTest]
    steps: Mapping[int, ServerSteps]
    max_batch_weight: int
    """The server's setting, as far as its load tests show it."""

    @property
    def clean_users(self) -> tuple[int, ...]:
        """Levels in which less than 1 % of the requests failed."""
        return tuple(users for users, test in sorted(self.tests.items()) if test.error_rate < CLEAN_ERROR_RATE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayError:
    """(simulated - measured) / measured of one load test, by metric."""

    llm: str
    gpu_profile: str
    users_count: int
    errors: Latencies
    """Relative, whatever the units in the names."""


def measured_servers(tests: Iterable[LoadTest]) -> tuple[MeasuredServer, ...]:
    """Group load tests by LLM and GPU profile and rebuild their steps."""
    padded = {name: not llm.spec.uses_flash_attention for name, llm in load_measured_llms().items()}
    groups: dict[tuple[str, str], dict[int, LoadTest]] = defaultdict(dict)
    for test in tests:
        groups[test.llm, test.gpu_profile][test.users_count] = test
    return tuple(
        MeasuredServer(
            llm=llm,
            gpu_profile=gpu_profile,
            is_padded=padded[llm],
            tests=group,
            steps={users: rebuild_steps(test.timeline, is_padded=padded[llm]) for users, test in sorted(group.items())},
            max_batch_weight=largest_batch_weight(*(test.timeline for test in group.values()), is_padded=padded[llm]),
        )
        for (llm, gpu_profile), group in sorted(groups.items())
    )


def errors_after_calibration(
    server: MeasuredServer, requests: FixedList, *, fitted_users: Iterable[int], prior: StepPrior | None = None
) -> list[ReplayError]:
    """Return the errors on the clean levels other than those of `fitted_users`, whose clean ones are fitted on.

    prior: what other LLMs' servers say of the constants. Empty where none of `fitted_users` is clean.
    """
    chosen = sorted(set(fitted_users).intersection(server.clean_users))
    if not chosen:
        return []
    constants = fit_steps(*(server.steps[users] for users in chosen), prior=prior).constants
    known = [server.tests[users] for users in chosen]
    return errors_with(
        server, requests, constants, known=known, tested_users=set(server.clean_users) - set(fitted_users)
    )


def errors_with(
    server: MeasuredServer,
    requests: FixedList,
    constants: StepConstants,
    *,
    known: Iterable[LoadTest],
    tested_users: Iterable[int],
) -> list[ReplayError]:
    """Return the errors on these levels; known: load tests that tell the client's delay and the withheld tokens."""
    known = list(known)
    is_withheld = withheld_first_tokens(known, requests)
    turnaround = float(np.median([test.turnaround_seconds for test in known]))
    errors = []
    for users in sorted(tested_users):
        simulated = replayed(
            server.tests[users],
            requests=requests,
            constants=constants,
            max_batch_weight=server.max_batch_weight,
            is_padded=server.is_padded,
            turnaround_seconds=turnaround,
            is_withheld=is_withheld,
        )
        errors.append(
            ReplayError(
                llm=server.llm,
                gpu_profile=server.gpu_profile,
                users_count=users,
                errors=_relative(simulated, measured(server.tests[users])),
            )
        )
    return errors


def mean_absolute_percent(errors: Iterable[ReplayError]) -> dict[str, float]:
    """Return the mean absolute error of each metric in percent, every load test weighing the same."""
    return _percent([error.errors for error in errors], np.abs)


def mean_percent(errors: Iterable[ReplayError]) -> dict[str, float]:
    """Return the mean error of each metric in percent: above 0, the simulation says too much."""
    return _percent([error.errors for error in errors], np.positive)


def _percent(rows: list[Latencies], weigh: np.ufunc) -> dict[str, float]:
    values = {name: np.array([getattr(row, name) for row in rows], np.float64) for name in METRICS}
    return {name: float(100 * np.nanmean(weigh(of_name))) for name, of_name in values.items()}


def _relative(simulated: Latencies, truth: Latencies) -> Latencies:
    return Latencies(**{name: getattr(simulated, name) / getattr(truth, name) - 1 for name in METRICS})
