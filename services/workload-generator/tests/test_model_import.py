import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from llmpilot_contracts.errors import InvalidInputError, NotFoundError
from llmpilot_workload_generator.files.model_file import model_to_bytes
from llmpilot_workload_generator.imports.fmperf_model import CLASS_NAME, request_counts
from llmpilot_workload_generator.imports.length_cdf import LENGTHS_COUNT
from llmpilot_workload_generator.imports.model_import import import_bytes, import_model
from llmpilot_workload_generator.model import Kind, WorkloadModel, bin_centres, bin_counts
from llmpilot_workload_generator.profiles import profile_path
from llmpilot_workload_generator.statistics import describe

COLUMNS = ["generated_token_count", "params.temperature", "is_greedy"]
PUBLISHED: dict[str, Any] = {
    "columns_": pd.Index(COLUMNS, dtype=object),
    "bin_edges_": {COLUMNS[0]: [1.0, 3.0, 1500.0], COLUMNS[1]: [0.0, 0.5], COLUMNS[2]: [0.0, 1.0]},
    "bin_labels_": {COLUMNS[0]: [1.5, 100.0, 1500.0], COLUMNS[1]: [0.0, 0.7], COLUMNS[2]: [0.0, 1.0]},
    "indices_flat_": [(2, 0.0, True), (100, 0.7, False), (1500, 0.0, True)],
    "probs_flat_": [np.float64(0.5), np.float64(0.375), np.float64(0.125)],
}
"""Eight requests by hand, in the form of the published model: 1 and 2 tokens twice, 100 thrice, 1500 once."""


def published(**changes: Any) -> bytes:
    """Pickle a model as the published one is, of a class of a module that nobody has."""
    module_name, _, class_name = CLASS_NAME.partition(".")
    module = ModuleType(module_name)
    kind = type(class_name, (), {"__module__": module_name})
    setattr(module, class_name, kind)
    held = kind()
    held.__dict__.update({**PUBLISHED, **changes})
    sys.modules[module_name] = module
    try:
        return pickle.dumps(held, 4)
    finally:
        del sys.modules[module_name]


def problem(content: bytes, **options: Any) -> str:
    with pytest.raises(InvalidInputError) as caught:
        import_bytes(content, label="x", **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def fmperf(public_data: Path) -> WorkloadModel:
    return import_model(public_data / "fmperf" / "all_nbins_64.pkl")


def test_published_model_has_all_cells_and_requests(fmperf: WorkloadModel) -> None:
    assert len(fmperf.keys) == 46_526
    assert fmperf.request_count == 8_497_715
    assert fmperf.names == (
        "output_tokens",
        "input_tokens",
        "temperature",
        "top_p",
        "top_k",
        "batch_size",
        "is_greedy",
    )
    assert [len(parameter.bins) for parameter in fmperf.parameters] == [41, 56, 15, 12, 17, 5, 2]
    assert [parameter.kind for parameter in fmperf.parameters].count(Kind.NUMBER) == 2


def test_published_model_takes_less_than_100_kb(fmperf: WorkloadModel) -> None:
    assert len(model_to_bytes(fmperf)) < 100_000


def test_numbers_of_the_published_model_are_those_known(fmperf: WorkloadModel) -> None:
    """Computed from the pickle itself, with pandas: FACTS section 1."""
    description = describe(fmperf)
    marginals = {marginal.name: marginal for marginal in description.marginals}
    assert marginals["output_tokens"].mean == pytest.approx(17.6, abs=0.05)
    assert marginals["input_tokens"].mean == pytest.approx(230.2, abs=0.05)
    assert marginals["batch_size"].mean == pytest.approx(1.97, abs=0.005)
    assert marginals["output_tokens"].counts[19] / 8_497_715 == pytest.approx(0.274, abs=5e-4)
    assert description.entropy_bits == pytest.approx(9.194, abs=5e-4)
    assert description.marginal_entropy_bits == pytest.approx(16.305, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "other", "expected"),
    [
        ("output_tokens", "input_tokens", 0.545),
        ("output_tokens", "batch_size", -0.718),
        ("input_tokens", "batch_size", -0.598),
        ("output_tokens", "temperature", 0.553),
        ("output_tokens", "top_p", -0.524),
        ("output_tokens", "top_k", 0.510),
        ("input_tokens", "temperature", 0.540),
        ("input_tokens", "top_p", -0.079),
        ("input_tokens", "top_k", 0.510),
        ("temperature", "top_k", 0.622),
        ("temperature", "batch_size", -0.601),
        ("top_k", "batch_size", -0.697),
        ("top_p", "batch_size", 0.449),
    ],
)
def test_correlations_of_the_published_model_are_those_known(
    fmperf: WorkloadModel, name: str, other: str, expected: float
) -> None:
    found = describe(fmperf).spearman[fmperf.index_of(name)][fmperf.index_of(other)]
    assert found == pytest.approx(expected, abs=5e-4)


def test_means_of_bins_are_the_published_labels(fmperf: WorkloadModel) -> None:
    """Labels of the pickle: of the last bins, of one inside, and of one whose label is off by a rounding error."""
    tokens, temperature = fmperf.parameters[1], fmperf.parameters[2]
    assert bin_centres(tokens)[-1] == pytest.approx(1868.4838247024175, abs=1e-9)
    assert bin_centres(tokens)[0] == pytest.approx(5.991650968998435, abs=1e-9)
    assert bin_centres(temperature)[[2, -1]] == pytest.approx([0.1, 1.6779976019184653], abs=1e-9)


def test_bins_know_the_range_of_the_traces(fmperf: WorkloadModel) -> None:
    """Table II of the paper: input 1 to 4093, output 1 to 1500, batch size 1 to 5."""
    ranges = {parameter.name: (parameter.sketch.low, parameter.sketch.high) for parameter in fmperf.parameters}
    lengths = {name: ranges[name] for name in ("input_tokens", "output_tokens", "batch_size")}
    assert lengths == {"input_tokens": (1, 4093), "output_tokens": (1, 1500), "batch_size": (1, 5)}
    tokens = fmperf.parameters[1]
    assert (tokens.lows[-1], tokens.highs[-1]) == (1694, 4093)


def test_sketches_count_what_the_cells_do(fmperf: WorkloadModel) -> None:
    for index, parameter in enumerate(fmperf.parameters):
        held = np.bincount(fmperf.codes[index], weights=fmperf.counts)
        assert bin_counts(parameter).tolist() == held.tolist()
        assert (parameter.bins.find(parameter.lows) == np.arange(len(parameter.bins))).all()
        assert (parameter.bins.find(parameter.highs) == np.arange(len(parameter.bins))).all()


def test_most_frequent_cell_is_the_published_one(fmperf: WorkloadModel) -> None:
    """(20, 85, 0.7, 0.73, 31, 1, False) has the share .026852395026192334."""
    place = int(fmperf.counts.argmax())
    values = [
        bin_centres(parameter)[code] for parameter, code in zip(fmperf.parameters, fmperf.codes[:, place], strict=True)
    ]
    assert values == pytest.approx([20, 85, 0.7, 0.73, 31, 1, 0])
    assert fmperf.counts[place] == round(0.026852395026192334 * 8_497_715)


def test_small_model_is_imported_by_hand() -> None:
    model = import_bytes(published(), label="x", command="import x")
    tokens, temperature, greedy = model.parameters
    assert model.request_count == 8
    assert model.provenance.command == "import x"
    assert tokens.sketch.values[:2].tolist() == [1, 2]
    assert tokens.sketch.counts[:2].tolist() == [2, 2]
    assert tokens.sketch.counts[2:-1] @ tokens.sketch.values[2:-1] == 300
    assert tokens.sketch.values[-1] == 1500
    assert temperature.sketch.values.tolist() == [0, 0.7]
    assert greedy.sketch.counts.tolist() == [3, 5]
    assert model.codes.T.tolist() == [[0, 0, 1], [1, 1, 0], [2, 0, 1]]
    assert model.counts.tolist() == [4, 3, 1]


def test_counts_are_found_though_no_cell_was_seen_once() -> None:
    assert request_counts(np.array([2, 3, 5]) / 10).tolist() == [2, 3, 5]
    assert request_counts(np.array([1, 1, 1]) / 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"columns_": pd.Index(["user"], dtype=object)}, "parameters must be of generated_token_count, "),
        ({"probs_flat_": [0.5, 0.5]}, "must have a share, and a bin of every parameter, for each cell"),
        ({"probs_flat_": [0.5, 0.5, 0.0]}, "shares must be > 0"),
        ({"probs_flat_": [0.5, float("nan"), 0.5]}, "must have a share"),
        ({"probs_flat_": [0.5, 0.1, 2**-0.5 - 0.1]}, "shares must be whole numbers of requests"),
        ({"indices_flat_": [(2, 0.0, True)] * 3}, "two cells are in the same bins"),
        ({"indices_flat_": [(2, 0.0, True), (100, 0.7, False), (7, 0.0, True)]}, "a cell must be in exactly one bin"),
        ({"bin_edges_": {}}, "KeyError: 'generated_token_count'"),
        ({"bin_labels_": {**PUBLISHED["bin_labels_"], COLUMNS[0]: [1.6, 100.0, 1500.0]}}, "add up to a whole number"),
        ({"bin_edges_": {**PUBLISHED["bin_edges_"], COLUMNS[0]: [1.0, 1e12, 2e12]}}, "must have 1 to 1,048,576 points"),
        (
            {"bin_edges_": {**PUBLISHED["bin_edges_"], COLUMNS[0]: [3.0, 1.0, 1500.0]}},
            "must have 1 to 1,048,576 points",
        ),
        ({"indices_flat_": 5}, "must be a workload model as fmperf publishes it"),
    ],
)
def test_other_content_of_the_pickle_is_rejected(changes: dict[str, Any], expected: str) -> None:
    assert expected in problem(published(**changes))


def test_harmful_pickle_is_refused() -> None:
    assert problem(published(bin_edges_=print)) == (
        "x: asks for builtins.print, which a pickle of plain data does not need"
    )


def test_use_case_of_a_pickle_is_rejected() -> None:
    assert problem(published(), use_case="cnn").startswith("use_case: goes with a CSV")


def test_model_file_is_not_imported() -> None:
    assert "is a model file already" in problem(profile_path("production").read_bytes())


def test_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="published model"):
        import_model(tmp_path / "none.pkl")


HEADER = b"use_case,side,tokens,cdf\n"
CURVES = HEADER + b"qa,input,2,0\nqa,input,2,0.25\nqa,input,4,0.75\nqa,input,5,1\nqa,output,7,0\nqa,output,7,1\n"


def test_curve_is_steps_and_straight_lines() -> None:
    """A quarter at 2; a half from 2 to 4, as much on each side of 3 as its neighbours take; a quarter from 4 to 5."""
    model = import_bytes(CURVES, label="x", use_case="qa")
    tokens = model.parameters[0].sketch
    assert tokens.values.tolist() == [2, 3, 4, 5]
    assert (tokens.counts / tokens.total).tolist() == [0.375, 0.25, 0.25, 0.125]
    assert model.parameters[1].sketch.values.tolist() == [7]
    assert model.request_count == LENGTHS_COUNT**2


@pytest.mark.parametrize(
    ("use_case", "input_mean", "output_mean"),
    [("alpaca", 18.8, 58.5), ("cnn", 868.8, 67.0), ("dolly", 67.7, 76.1), ("sharegpt", 342, 235)],
)
def test_published_lengths_have_the_means_of_the_figure(
    public_data: Path, use_case: str, input_mean: float, output_mean: float
) -> None:
    """The figure's own markers of the means; 1 / 10,000 of the requests are rounded to the largest length."""
    model = import_model(public_data / "workload-choice" / "token_length_cdf.csv", use_case=use_case)
    description = describe(model)
    means = [marginal.mean for marginal in description.marginals]
    assert means == pytest.approx([input_mean, output_mean], rel=0.003)
    assert description.spearman[0][1] == pytest.approx(0, abs=1e-9)
    assert description.total_correlation_bits == pytest.approx(0, abs=1e-9)
    assert [len(marginal.counts) for marginal in description.marginals] == [64, 64]


def test_largest_published_lengths_are_kept(public_data: Path) -> None:
    model = import_model(public_data / "workload-choice" / "token_length_cdf.csv", use_case="cnn")
    assert [parameter.sketch.high for parameter in model.parameters] == [3814, 2427]


@pytest.mark.parametrize("use_case", [None, "chat"])
def test_use_cases_of_the_file_are_named(use_case: str | None) -> None:
    assert problem(CURVES, use_case=use_case).startswith("use_case: must be")
    assert problem(CURVES, use_case=use_case).endswith(": qa")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"use_case,cdf\n1,2\n", "x column side: is missing; x column tokens: is missing"),
        (b"a,b\n1,2\n", "x: must be the pickle published with fmperf, or CSV with the columns use_case, side, tokens"),
        (b"\xff\xfe", "x: must be the pickle published with fmperf, or CSV with"),
        (b"", "x: must be the pickle published with fmperf, or CSV with"),
        (HEADER, "use_case: must be one of the file's, is 'qa'"),
        (HEADER + b"qa,middle,1,0\nqa,input,x,0\n", "x line 2: side must be input or output, is 'middle'; x line 3"),
        (HEADER + b"qa,input,1\n", "x line 2: tokens and cdf must be numbers"),
        (HEADER + b"qa,input,1,0\nqa,input,2,1\n", "x qa: has no curve of the output side"),
        (CURVES.replace(b"0.75", b"0.2"), "x qa input: cdf must never fall, from 0 to 1"),
        (CURVES.replace(b"0.75", b"nan"), "x qa input: cdf must never fall, from 0 to 1"),
        (CURVES.replace(b"4,0.75", b"1,0.75"), "x qa input: tokens must be from 0 to 1,048,576 and never fall"),
        (CURVES.replace(b"5,1", b"1e9,1"), "x qa input: tokens must be from 0 to 1,048,576 and never fall"),
        (CURVES.replace(b"5,1", b"5,0.9"), "x qa input: cdf must never fall, from 0 to 1"),
    ],
)
def test_bad_curves_are_rejected(content: bytes, expected: str) -> None:
    assert problem(content, use_case="qa").startswith(expected)
