import numpy as np
import pytest

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_workload_generator.prompts.sampling_parameters import SamplingParameters, read_sampling


def test_without_columns_the_server_decides_all() -> None:
    assert read_sampling({}, 2) == [SamplingParameters()] * 2


def test_greedy_requests_have_no_other_parameter() -> None:
    columns = {"is_greedy": np.array([1]), "temperature": np.array([0.7]), "top_k": np.array([31])}
    assert read_sampling(columns, 1) == [SamplingParameters(greedy=True)]


def test_zero_is_no_limit_and_not_greedy() -> None:
    columns = {
        "is_greedy": np.array([0]),
        "temperature": np.array([0.0]),
        "top_p": np.array([0.0]),
        "top_k": np.array([0]),
    }
    assert read_sampling(columns, 1) == [SamplingParameters(greedy=False, temperature=1.0, top_p=1.0, top_k=0)]


def test_minus_one_is_no_limit_of_top_k() -> None:
    assert read_sampling({"top_k": np.array([-1])}, 1) == [SamplingParameters(top_k=0)]


def test_noise_of_published_models_is_rounded() -> None:
    columns = {"is_greedy": np.array([0.0]), "temperature": np.array([0.09999999999999999]), "top_p": np.array([0.73])}
    assert read_sampling(columns, 1) == [SamplingParameters(greedy=False, temperature=0.1, top_p=0.73)]


def test_what_is_nearly_zero_does_not_become_no_limit() -> None:
    """0 would be "disabled" in TGIS and an error in TGI."""
    (found,) = read_sampling({"temperature": np.array([1e-9]), "top_p": np.array([1e-9])}, 1)
    assert found.temperature == found.top_p == 1e-6


def test_is_greedy_may_be_words_or_truth_values() -> None:
    assert [one.greedy for one in read_sampling({"is_greedy": np.array(["True", "false", "0"])}, 3)] == [
        True,
        False,
        False,
    ]
    assert [one.greedy for one in read_sampling({"is_greedy": np.array([True, False])}, 2)] == [True, False]


def test_requests_of_the_same_parameters_share_one_object() -> None:
    first, second, third = read_sampling({"top_k": np.array([3, 3, 4])}, 3)
    assert first is second
    assert first is not third


def test_all_that_is_wrong_is_said_at_once() -> None:
    columns = {
        "is_greedy": np.array(["yes"]),
        "temperature": np.array([-0.5]),
        "top_p": np.array([1.5]),
        "top_k": np.array(["many"]),
    }
    with pytest.raises(InvalidInputError) as caught:
        read_sampling(columns, 1)
    assert str(caught.value) == (
        "is_greedy: must be 0 or 1, false or true, is yes; temperature: must be >= 0, is -0.5; "
        "top_p: must be from 0 to 1, is 1.5; top_k: must be a column of numbers, is one of text"
    )


def test_nan_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="temperature: must be >= 0, is nan"):
        read_sampling({"temperature": np.array([np.nan])}, 1)
