"""A model fitted to its own draws is the model."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from llmpilot_workload_generator.fitting.fit import FitOptions, fit
from llmpilot_workload_generator.profiles import load_profile
from llmpilot_workload_generator.sampling.sampler import SampleOptions, Sampler, ValueChoice
from llmpilot_workload_generator.statistics import compare, describe
from llmpilot_workload_generator.traces.reader import open_trace

DRAWS = 1_000_000


def test_a_fit_of_a_million_draws_recovers_the_model(tmp_path: Path) -> None:
    """Of n draws the counts of a cell of probability p have deviation sqrt(n p (1 - p)); 5 of them for 46,526 cells."""
    model = load_profile("production")
    sample = Sampler(model, SampleOptions(seed=7)).draw(0, DRAWS)
    pq.write_table(sample.to_arrow(), tmp_path / "drawn.parquet")
    # Bins of the drawn values: centres, rounded where values are whole, lie in the bins they were drawn from.
    edges = tuple(parameter.bins for parameter in model.parameters)
    found = fit(open_trace(tmp_path / "drawn.parquet"), FitOptions(edges=edges))
    assert found.request_count == DRAWS
    assert set(found.keys.tolist()) <= set(model.keys.tolist())
    expected = model.counts / model.request_count
    counts = np.zeros(len(model.keys))
    counts[np.searchsorted(model.keys, found.keys)] = found.counts
    deviations = np.abs(counts - DRAWS * expected) / np.sqrt(DRAWS * expected * (1 - expected))
    large = DRAWS * expected >= 10  # below, a count is not normal
    assert deviations[large].max() < 5.5
    ours, theirs = (np.array(describe(one).spearman, np.float64) for one in (found, model))
    assert np.abs(ours - theirs).max() < 0.005


def test_a_fit_of_draws_by_quantiles_recovers_the_marginals(tmp_path: Path) -> None:
    """KS at 0.1 %: 1.95 / sqrt(n)."""
    model = load_profile("conversation")
    sample = Sampler(model, SampleOptions(seed=7, value_choice=ValueChoice.QUANTILES)).draw(0, DRAWS)
    pq.write_table(sample.to_arrow(), tmp_path / "drawn.parquet")
    found = fit(open_trace(tmp_path / "drawn.parquet"), FitOptions())
    assert [distance.distance < 1.95 / np.sqrt(DRAWS) for distance in compare(found, model).distances] == [True, True]
