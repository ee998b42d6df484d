import io
import json

import numpy as np
import pytest
from rich.console import Console

from llmpilot_workload_generator.model import (
    ArrivalKind,
    Arrivals,
    Bins,
    Kind,
    Parameter,
    Provenance,
    Sketch,
    WorkloadModel,
)
from llmpilot_workload_generator.model_report import (
    arrival_words,
    comparison_json,
    description_json,
    number_text,
    print_comparison,
    print_description,
    print_profiles,
)
from llmpilot_workload_generator.profiles import PROFILE_NAMES, load_profile
from llmpilot_workload_generator.statistics import compare, describe


def terminal(width: int = 80) -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, width=width, highlight=False), written


def test_description_fits_a_terminal_of_80_columns() -> None:
    model = load_profile("production")
    console, written = terminal()
    print_description(model, describe(model), console=console)
    text = written.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "requests: 8,497,715 in 46,526 cells" in text
    assert "licence:  Apache-2.0" in text
    rows = {
        line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith(("output", "batch_size"))
    }
    assert rows["output_tokens"] == ["1.000", "0.545", "0.553", "-0.524", "0.510", "-0.718", "0.094"]
    assert " ".join(text.split("entropy")[-1].split()) == (
        "9.194 bits; of the parameters one by one 16.305 bits; total correlation 7.111 bits"
    )


def test_correlations_of_many_parameters_are_readable_on_80_columns() -> None:
    """Fourteen parameters, the names of three words: the numbers of none are cut."""
    count = 14
    bins = [Bins(name=f"parameter_number_{index}", kind=Kind.INTEGER, edges=np.arange(2.0)) for index in range(count)]
    sketch = Sketch(values=np.arange(2.0), counts=np.array([3, 3]), exact=True, low=0.0, high=1.0)
    model = WorkloadModel(
        parameters=tuple(Parameter(bins=one, sketch=sketch, lows=np.arange(2.0), highs=np.arange(2.0)) for one in bins),
        keys=np.array([0, 2**count - 1], np.uint64),
        counts=np.array([3, 3]),
        provenance=Provenance(source="by hand"),
    )
    console, written = terminal()
    print_description(model, describe(model), console=console)
    correlations = written.getvalue().partition("Spearman")[2].partition("entropy")[0]
    assert "…" not in correlations
    assert max(map(len, correlations.splitlines())) <= 80
    assert correlations.count("1.000") == count**2


def test_json_holds_what_the_table_shows() -> None:
    model = load_profile("conversation")
    found = json.loads(json.dumps(description_json(model, describe(model))))
    assert found["request_count"] == 19_366
    assert found["arrivals"] == {"kind": "gamma", "rate_per_second": 5.53, "burstiness": 0.8621, "speed": 1.0}
    assert found["first_time"].startswith("2023-11-16T18:15:46")
    assert sum(found_bin["count"] for found_bin in found["marginals"][0]["bins"]) == 19_366
    assert found["spearman"]["input_tokens"]["input_tokens"] == pytest.approx(1)


def test_comparison_names_both_models() -> None:
    comparison = compare(load_profile("code"), load_profile("production"))
    console, written = terminal()
    print_comparison(comparison, names=("code", "production"), console=console)
    text = written.getvalue()
    assert "code: 8,819 requests and production: 8,497,715 requests" in text
    assert "only production has temperature, top_p, top_k, batch_size, is_greedy" in text
    assert text.count("differ ") == 2
    assert json.loads(json.dumps(comparison_json(comparison)))["only_first"] == []


def test_models_of_one_name_are_told_apart() -> None:
    comparison = compare(load_profile("code"), load_profile("code"))
    console, written = terminal()
    print_comparison(comparison, names=("m", "m"), console=console)
    assert "m (1): 8,819 requests and m (2): 8,819 requests" in written.getvalue()
    assert "alike" in written.getvalue()


def test_profiles_are_listed_with_source_and_licence() -> None:
    console, written = terminal(width=200)
    print_profiles({name: load_profile(name) for name in PROFILE_NAMES}, console=console)
    text = written.getvalue()
    assert all(name in text for name in PROFILE_NAMES)
    assert "arrivals: gamma, 5.53/s, burstiness 0.8621" in text
    assert "conversation (Patel et al., ISCA '24); CC-BY-4.0, Microsoft" in text


@pytest.mark.parametrize("kind", list(ArrivalKind))
def test_every_arrival_process_has_words(kind: ArrivalKind) -> None:
    assert arrival_words(Arrivals(kind=kind, rate_per_second=2, speed=3))


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0, "0"), (17.63179, "17.63"), (-0.25, "-0.25"), (12035.06, "12,035")]
)
def test_numbers_have_four_digits(value: float | None, text: str) -> None:
    assert number_text(value) == text
    assert number_text(np.float64(5)) == "5"
