import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_workload_generator.sampling.random_stream import LARGEST_SEED, mix, random_numbers, stream_key

WORDS = st.integers(0, LARGEST_SEED)


def test_the_numbers_are_those_of_splitmix64() -> None:
    """The published test vector: seed 1234567, as the reference implementation prints it."""
    assert random_numbers(1234567, 0, 5).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(WORDS, st.integers(0, 2**60), st.integers(0, 40), st.integers(0, 40))
def test_a_stream_is_the_same_however_it_is_cut(key: int, start: int, first: int, second: int) -> None:
    whole = random_numbers(key, start, first + second)
    parts = [random_numbers(key, start, first), random_numbers(key, start + first, second)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_streams_and_seeds_begin_at_different_places() -> None:
    keys = {stream_key(seed, stream) for seed in (0, 1, 2, LARGEST_SEED) for stream in range(100)}
    assert len(keys) == 400


def test_mixing_maps_one_to_one() -> None:
    assert len(np.unique(mix(np.arange(100_000, dtype=np.uint64)))) == 100_000


def test_numbers_of_neighbouring_streams_are_not_correlated() -> None:
    """N = 10^6 pairs: the correlation of independent numbers has a deviation of 10^-3; five of them."""
    count = 1_000_000
    for seed, stream in ((0, 1), (1, 0), (1, 1)):
        first, second = (
            random_numbers(stream_key(*place), 0, count).astype(np.float64) for place in ((0, 0), (seed, stream))
        )
        assert abs(np.corrcoef(first, second)[0, 1]) < 5e-3
