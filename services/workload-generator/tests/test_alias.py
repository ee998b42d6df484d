import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_workload_generator.model import Floats
from llmpilot_workload_generator.sampling.alias import AliasTable, build_alias

COUNTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=70).filter(any)


def probabilities(table: AliasTable, count: int) -> Floats:
    """What each thing is drawn with: slots are equally likely, thresholds and their aliases share a slot."""
    own = (table.slots >> np.uint64(32)).astype(np.float64) / 2**32
    aliases = (table.slots & np.uint64(2**32 - 1)).astype(np.int64)
    drawn = np.bincount(aliases, 1 - own, len(table.slots)) + own
    assert not drawn[count:].any()
    return drawn[:count] / len(table.slots)


@given(COUNTS)
def test_things_are_drawn_with_the_probabilities_of_their_counts(counts: list[int]) -> None:
    """A threshold is cut to 32 bits, and a thing is in its own slot and in others' as an alias: 2^-32 per slot."""
    drawn = probabilities(build_alias(np.array(counts)), len(counts))
    assert np.abs(drawn - np.array(counts) / sum(counts)).max() <= 2**-31
    assert all(share == 0 for share, count in zip(drawn, counts, strict=True) if count == 0)


@given(COUNTS, st.floats(1e-300, 1e250))
def test_weights_may_be_any_numbers(counts: list[int], unit: float) -> None:
    weights = np.array(counts) * unit
    if not weights.any():
        return
    drawn = probabilities(build_alias(weights), len(counts))
    assert np.abs(drawn - weights / weights.max() / (weights / weights.max()).sum()).max() <= 2**-31
    assert not drawn[weights == 0].any()


def test_counts_too_large_for_the_product_are_scaled() -> None:
    drawn = probabilities(build_alias(np.array([2**61, 2**60, 2**60])), 3)
    assert drawn == pytest.approx([0.5, 0.25, 0.25], abs=2**-31)


def test_one_thing_is_always_drawn() -> None:
    table = build_alias(np.array([7]))
    assert len(table.slots) == 1
    assert probabilities(table, 1).tolist() == [1.0]
    assert (np.uint64(2**64 - 1) >> np.uint64(1)) >> table.shift == 0


def test_read_only_counts_do() -> None:
    counts = np.arange(1, 6)
    counts.setflags(write=False)
    assert probabilities(build_alias(counts), 5) == pytest.approx(counts / 15, abs=2**-31)


def test_two_million_cells_fit_into_a_table() -> None:
    """Counts fall like 1 / rank; probabilities are right to 2^-32 of a slot each."""
    count = 2_000_000
    counts = 10**9 // np.arange(1, count + 1)
    drawn = probabilities(build_alias(counts), count)
    assert np.abs(drawn - counts / counts.sum()).max() <= 2**-31
