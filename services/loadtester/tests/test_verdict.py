from dataclasses import replace

import pytest

from llmpilot_loadtester.domain.health import WorkerHealth
from llmpilot_loadtester.domain.metrics import stage_metrics
from llmpilot_loadtester.domain.records import empty_records
from llmpilot_loadtester.domain.results import ErrorCount, LatencySummary, StageMetrics
from llmpilot_loadtester.domain.spec import Load, LoadKind, ServiceLevel, UserStep
from llmpilot_loadtester.domain.verdict import REQUESTS_FOR_P99, verdict_of
from llmpilot_loadtester.domain.window import Window

EMPTY = stage_metrics(empty_records(), Window(from_nanos=0, until_nanos=10**10), ServiceLevel(), seed=0)
FINE = replace(
    EMPTY,
    request_count=1_000,
    ok_count=1_000,
    sent_per_second=100.0,
    steady=True,
    token_count_sources=("server",),
    stamp_sources=("kernel",),
    send_lateness=LatencySummary(count=1_000, p99_ms=0.2, max_ms=1.5),
)
HEALTHY = WorkerHealth(cpu_share=0.5, loop_lag_p99_ms=0.4, read_count=100_000)
USERS = Load(kind=LoadKind.USERS, user_steps=(UserStep(at_seconds=0, users_count=8),))
POISSON = Load(kind=LoadKind.POISSON, rate_per_second=100)
SLOW = Load(kind=LoadKind.CONSTANT, rate_per_second=2)
AT_ONCE = Load(kind=LoadKind.ALL_AT_ONCE, request_count=1_000)
TRACE = Load(kind=LoadKind.TRACE)


@pytest.mark.parametrize("load", [USERS, POISSON, AT_ONCE, TRACE], ids=lambda load: load.kind)
def test_healthy_stage_counts_without_remarks(load: Load) -> None:
    verdict = verdict_of([HEALTHY, HEALTHY], FINE, load)
    assert (verdict.is_valid, verdict.reasons) == (True, ())
    assert verdict.notes == (() if load is not AT_ONCE else ("It took 1.5 ms to send all requests at once.",))


def late(p99_ms: float) -> StageMetrics:
    return replace(FINE, send_lateness=LatencySummary(count=1_000, p99_ms=p99_ms, max_ms=p99_ms))


USER_SPACE = replace(FINE, stamp_sources=("kernel", "user_space"))


@pytest.mark.parametrize(
    ("health", "metrics", "load", "reason"),
    [
        (replace(HEALTHY, cpu_share=0.95), FINE, USERS, "used 95% of a core in its busiest second, the limit is 90%"),
        (replace(HEALTHY, loop_lag_p99_ms=5.1), FINE, POISSON, "woke up 5.1 ms late (p99), the limit is 5 ms"),
        (replace(HEALTHY, loop_lag_p99_ms=5.1), USER_SPACE, USERS, "woke up 5.1 ms late (p99), the limit is 5 ms"),
        (
            replace(HEALTHY, coalesced_read_count=2_001, loop_lag_p99_ms=1.1),
            FINE,
            USERS,
            "2,001 of 200,000 reads (1.0%)",
        ),
        (replace(HEALTHY, starved_count=2), FINE, USERS, "2 requests waited"),
        (
            replace(HEALTHY, clock_step_ms=1.5),
            FINE,
            USERS,
            "set by 1.5 ms while requests were under way, the limit is 1",
        ),
        (replace(HEALTHY, dropped_record_count=1), FINE, USERS, "1 records were dropped, the limit is 0"),
        # the mean gap at 100/s is 10 ms, a tenth of it 1 ms: the limit is 2 ms
        (HEALTHY, late(2.1), POISSON, "sent 2.1 ms late (p99), the limit is 2.0 ms at 100 requests/s"),
        (HEALTHY, late(2.1), TRACE, "sent 2.1 ms late (p99), the limit is 2.0 ms at 100 requests/s"),
        # at 2/s it is 500 ms, a tenth of it 50 ms
        (HEALTHY, late(51), SLOW, "sent 51.0 ms late (p99), the limit is 50.0 ms at 2 requests/s"),
        (HEALTHY, EMPTY, USERS, "No request was sent in the measured window"),
    ],
)
def test_numbers_of_a_client_that_was_too_slow_do_not_count(
    health: WorkerHealth, metrics: StageMetrics, load: Load, reason: str
) -> None:
    """One unhealthy worker of two is enough; the sentence has the number and the limit, and there is no other."""
    verdict = verdict_of([HEALTHY, health], metrics, load)
    assert not verdict.is_valid
    assert len(verdict.reasons) == 1
    assert reason in verdict.reasons[0]
    assert verdict.reasons[0].endswith(".")


@pytest.mark.parametrize(
    ("health", "metrics", "load"),
    [
        (replace(HEALTHY, cpu_share=0.89), FINE, USERS),
        (replace(HEALTHY, loop_lag_p99_ms=50), FINE, USERS),
        (replace(HEALTHY, loop_lag_p99_ms=5), FINE, POISSON),
        (replace(HEALTHY, loop_lag_p99_ms=50), FINE, AT_ONCE),
        (replace(HEALTHY, coalesced_read_count=2_000), FINE, USERS),
        (replace(HEALTHY, starved_count=1), FINE, POISSON),
        (replace(HEALTHY, clock_step_ms=1), FINE, USERS),
        (HEALTHY, late(2.0), POISSON),
        (HEALTHY, late(49), SLOW),
        (HEALTHY, late(100), USERS),
        (HEALTHY, late(100), AT_ONCE),
    ],
)
def test_numbers_at_the_limits_count(health: WorkerHealth, metrics: StageMetrics, load: Load) -> None:
    assert verdict_of([HEALTHY, health], metrics, load).is_valid


def test_parts_that_the_server_sends_together_are_told_and_count() -> None:
    """A worker that was in time did not merge them; speculative decoding writes several tokens at once."""
    verdict = verdict_of([replace(HEALTHY, coalesced_read_count=20_000)] * 2, FINE, USERS)
    assert verdict.is_valid
    assert any("the server or the network sends them together" in note for note in verdict.notes)


def test_replies_of_another_model_are_told() -> None:
    verdict = verdict_of([HEALTHY, replace(HEALTHY, other_model="tiny", other_model_count=3)], FINE, USERS)
    assert verdict.is_valid
    assert any("3 replies say that they are of 'tiny'" in note for note in verdict.notes)


def test_no_success_is_no_measurement() -> None:
    errors = (ErrorCount(status="timeout", count=7, example="no byte in 600 s"),)
    verdict = verdict_of([HEALTHY], replace(FINE, request_count=7, ok_count=0, errors=errors), USERS)
    assert verdict.reasons == (
        "None of 7 requests succeeded, so there are no latencies; 7 were timeout: no byte in 600 s.",
    )


def test_no_worker_is_no_measurement() -> None:
    assert verdict_of([], FINE, USERS).reasons == ("No worker said how it did: look for one that was killed.",)


def test_all_reasons_are_given() -> None:
    health = replace(HEALTHY, cpu_share=1.0, loop_lag_p99_ms=90, clock_step_ms=9, dropped_record_count=1)
    assert len(verdict_of([health], late(80), POISSON).reasons) == 5


@pytest.mark.parametrize(
    ("health", "metrics", "load", "note"),
    [
        (
            HEALTHY,
            USER_SPACE,
            USERS,
            "stamped in user space, where the kernel gives no times: they are up to 0.4 ms late",
        ),
        (replace(HEALTHY, loop_lag_p99_ms=9), FINE, USERS, "sent their next request up to 9.0 ms late"),
        (HEALTHY, replace(FINE, steady=False), USERS, "had a trend"),
        (HEALTHY, replace(FINE, steady=None), USERS, "too few, or too long for the window, to tell"),
        (
            HEALTHY,
            replace(FINE, request_count=367, ok_count=367),
            USERS,
            "p99 is of 367 successful requests; below 368",
        ),
        (HEALTHY, replace(FINE, token_count_sources=("chunks",)), USERS, "give a tokenizer"),
    ],
)
def test_numbers_count_with_a_note(health: WorkerHealth, metrics: StageMetrics, load: Load, note: str) -> None:
    verdict = verdict_of([health], metrics, load)
    assert verdict.is_valid
    assert len(verdict.notes) == 1
    assert note in verdict.notes[0]


def test_failed_requests_beyond_one_percent_are_noted() -> None:
    errors = (ErrorCount(status="rejected", count=9, example="429"), ErrorCount(status="timeout", count=2, example=""))
    verdict = verdict_of([HEALTHY], replace(FINE, ok_count=989, errors=errors), USERS)
    assert verdict.notes == ("11 of 1,000 requests (1.1%) failed: 9 rejected, 2 timeout. Latencies are of the others.",)
    assert not verdict_of([HEALTHY], replace(FINE, ok_count=990, errors=errors[:1]), USERS).notes


def test_p99_of_enough_requests_is_bounded_by_the_largest() -> None:
    """.99^368 = .0248 <= .025 < .99^367 = .0250."""
    assert 0.99**REQUESTS_FOR_P99 <= 0.025 < 0.99 ** (REQUESTS_FOR_P99 - 1)
