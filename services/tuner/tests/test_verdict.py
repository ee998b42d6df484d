from llmpilot_perfmodel.step_memory.batch import Batch, Layout, Rows
from llmpilot_tuner.domain.limits import Limits
from llmpilot_tuner.domain.probing import CaseRun, Outcome
from llmpilot_tuner.domain.servers import TGI
from llmpilot_tuner.domain.verdict import lacking_bytes, soak_batches, soak_of

LIMITS = Limits(rules=TGI, longest_sequence=64, most_new_tokens=32, most_requests=32)


def ran(peak: int, reserved: int, live: int = 100) -> CaseRun:
    return CaseRun(
        batch=Batch(case="x", decode=(Rows(request_count=1, input_tokens=1),)),
        outcome=Outcome.PASSED,
        peak_bytes=peak,
        reserved_bytes=reserved,
        live_before_bytes=live,
    )


def test_a_soak_runs_every_batch_once_before_it_repeats_any() -> None:
    steps = soak_batches(LIMITS, 1000, step_count=60, seed=3)
    different = set(steps)
    assert len(steps) == 60
    assert len(set(steps[: len(different)])) == len(different)
    assert all(batch.pool_tokens == 1000 for batch in steps)
    assert LIMITS.rules.layout is Layout.PACKED


def test_a_short_soak_still_runs_every_batch() -> None:
    whole = set(soak_batches(LIMITS, 1000, step_count=200, seed=3))
    assert set(soak_batches(LIMITS, 1000, step_count=1, seed=3)) == whole


def test_a_seed_gives_one_order() -> None:
    first, again, other = (soak_batches(LIMITS, 1000, step_count=60, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_growth_is_what_was_held_beyond_the_first_round() -> None:
    """Rounds of two: 510 at most in the first, 540 afterwards."""
    soak = soak_of(
        [ran(400, 500), ran(410, 510), ran(400, 540), ran(410, 520, live=107)], batch_count=2, lowered_from=()
    )
    assert (soak.growth_bytes, soak.drift_bytes) == (30, 7)
    assert (soak.largest_peak_bytes, soak.largest_reserved_bytes) == (410, 540)


def test_what_grew_must_have_room_to_grow_once_more() -> None:
    """540 held, 30 grown, 7 drifted: 577 are needed."""
    soak = soak_of(
        [ran(400, 500), ran(410, 510), ran(400, 540), ran(410, 520, live=107)], batch_count=2, lowered_from=()
    )
    assert lacking_bytes(soak, 577) == 0
    assert lacking_bytes(soak, 570) == 7


def test_nothing_grown_takes_nothing_off() -> None:
    soak = soak_of([ran(400, 500), ran(410, 510)], batch_count=2, lowered_from=())
    assert lacking_bytes(soak, 510) == 0
