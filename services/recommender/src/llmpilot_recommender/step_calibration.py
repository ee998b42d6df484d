"""From the public raw records to the performance model's tables: fitted step constants, and the list of requests.

Invariant: every LLM and GPU profile in the records gets its constants or the calibration fails and names it.
Source: IBM/LLM-performance-prediction (Lazuka et al., 2024).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.steps.calibration import fit_steps, largest_batch_tokens
from llmpilot_perfmodel.steps.fitted import FittedConstants
from llmpilot_perfmodel.steps.iterations import ServerSteps, rebuild_steps
from llmpilot_recommender.calibration_source import LoadTest, load_tests
from llmpilot_recommender.measured_llms import load_measured_llms

CLEAN_ERROR_RATE = 0.01
"""A load test in which fewer requests failed shows the server itself, not its failures."""

_Advance = Callable[[int, int | None], None]
_Runs = list[tuple[LoadTest, ServerSteps]]


def calibrate_raw(
    path: Path, *, users: Iterable[int] = (), progress: _Advance = lambda _done, _total: None
) -> tuple[FittedConstants, ...]:
    """Return step constants for every LLM and GPU profile in a folder of CSVs or a tar archive.

    users: levels to fit on; none: all. Levels in which 1 % or more of the requests failed are left out where there are
    others. Raises InvalidInputError that names what cannot be read or fitted.
    """
    padded = {name: not llm.spec.uses_flash_attention for name, llm in load_measured_llms().items()}
    runs: dict[tuple[str, str], _Runs] = defaultdict(list)
    for test in _counted(load_tests(path), progress):
        if test.llm not in padded:
            raise InvalidInputError(
                [Violation("raw data", f"{test.llm!r} is not among the measured LLMs in llms.csv; add it there")]
            )
        runs[test.llm, test.gpu_profile].append((test, rebuild_steps(test.timeline, is_padded=padded[test.llm])))
    chosen_users = frozenset(users)
    return tuple(calibrate(runs[key], users=chosen_users, is_padded=padded[key[0]]) for key in sorted(runs))


def calibrate(runs: _Runs, *, users: frozenset[int], is_padded: bool) -> FittedConstants:
    """Return step constants from load tests of one LLM on one GPU profile; users: levels to fit on; none: all."""
    llm, gpu_profile = runs[0][0].llm, runs[0][0].gpu_profile
    chosen = [run for run in runs if not users or run[0].users_count in users]
    chosen = [run for run in chosen if run[0].error_rate < CLEAN_ERROR_RATE] or chosen
    try:
        fit = fit_steps(*(steps for _, steps in chosen))
    except InvalidInputError as error:
        name = f"{llm} on {gpu_profile}"
        raise InvalidInputError(
            Violation(f"{name}: {violation.field}", violation.description) for violation in error.violations
        ) from error
    return FittedConstants(
        llm=llm,
        gpu_profile=gpu_profile,
        constants=fit.constants,
        standard_errors=fit.standard_errors,
        decode_error=fit.decode_error,
        prefill_error=fit.prefill_error,
        largest_batch_tokens=largest_batch_tokens(*(steps for _, steps in runs)),
        is_padded=is_padded,
        users=tuple(sorted(test.users_count for test, _ in chosen)),
    )


def request_list(path: Path, *, progress: _Advance = lambda _done, _total: None) -> Counter[tuple[int, int]]:
    """Return how many requests of the list that all load tests draw from have which input and output tokens."""
    lengths: dict[int, tuple[int, int]] = {}
    for test in _counted(load_tests(path), progress):
        lengths |= request_lengths(test)
    return Counter(lengths.values())


def request_lengths(test: LoadTest) -> Mapping[int, tuple[int, int]]:
    """Return input and output tokens of the requests that succeeded, by their number in the fixed list."""
    ok = test.timeline.is_ok
    numbers, first = np.unique(test.request_number[ok], return_index=True)
    inputs, outputs = test.timeline.input_tokens[ok][first], test.timeline.output_tokens[ok][first]
    return dict(zip(numbers.tolist(), zip(inputs.tolist(), outputs.tolist(), strict=True), strict=True))


def _counted(tests: Iterable[LoadTest], progress: _Advance) -> Iterator[LoadTest]:
    for count, test in enumerate(tests, start=1):
        yield test
        progress(count, None)
