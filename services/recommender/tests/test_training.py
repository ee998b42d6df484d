from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import xgboost
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmpilot_contracts.errors import PreconditionError
from llmpilot_perfmodel.gpu_catalogue import GpuProfile, load_catalogue
from llmpilot_perfmodel.llm_spec import LlmSpec
from llmpilot_recommender.dataset import Dataset
from llmpilot_recommender.decision import LatencyLimits
from llmpilot_recommender.measured_llms import load_measured_llms
from llmpilot_recommender.measurement import Quantiles
from llmpilot_recommender.model_store import BUNDLED_MODEL, load_predictor
from llmpilot_recommender.predictor_xgboost import SMALLEST_LATENCY_MS, XgboostPredictor
from llmpilot_recommender.training import (
    Grid,
    Hyperparameters,
    TrainingSet,
    fit,
    select_hyperparameters,
    train_all,
    training_set,
    weighted_mape,
)

LIMITS = LatencyLimits(nttft_ms=100, itl_ms=50)
SPECS = {name: llm.spec for name, llm in load_measured_llms().items()}
PROFILES = {profile.name: profile for profile in load_catalogue().profiles()}
PARAMETERS = Hyperparameters(tree_count=6, max_depth=3, learning_rate=0.5, subsample=0.5, colsample_bytree=0.5)
GRID = Grid(
    tree_counts=(1, 3, 6), max_depths=(2, 4), learning_rates=(0.1, 0.5), subsamples=(0.5,), colsamples_bytree=(0.8,)
)
SEED = 7


@pytest.fixture(scope="module")
def data(small_dataset: Dataset) -> TrainingSet:
    return training_set(small_dataset, SPECS, PROFILES)


@pytest.fixture(scope="module")
def bundled_predictor() -> XgboostPredictor:
    return load_predictor(BUNDLED_MODEL)[1]


def test_training_set_has_a_row_per_measurement(small_dataset: Dataset, data: TrainingSet) -> None:
    rows = small_dataset.measurements
    assert data.features.shape == (len(rows), len(data.schema.names))
    assert len(rows) == 4 * 2 * 4
    assert data.llms.tolist() == [row.llm for row in rows]
    assert data.latencies_ms.tolist() == [[row.nttft.median_ms, row.itl.median_ms] for row in rows]
    assert len(set(data.curve_ids.tolist())) == 4 * 2
    users = data.features[:, data.schema.names.index("users_count")]
    assert users.tolist() == [row.users_count for row in rows]


def test_rows_without_both_latencies_or_without_a_description_are_left_out(small_dataset: Dataset) -> None:
    first, *_ = small_dataset.measurements
    dataset = small_dataset.with_measurement(replace(first, itl=Quantiles()))
    dataset = dataset.with_measurement(replace(first, llm="nobody/knows"))
    dataset = dataset.with_measurement(replace(first, gpu_profile="1xUnknown-1GB"))
    assert len(training_set(dataset, SPECS, PROFILES).llms) == len(small_dataset) - 1


def test_fewer_than_two_llms_are_refused(small_dataset: Dataset) -> None:
    only = Dataset(row for row in small_dataset.measurements if row.llm == "llama-7b")
    for dataset in (only, Dataset()):
        with pytest.raises(PreconditionError, match="at least two LLMs"):
            training_set(dataset, SPECS, PROFILES)


def test_same_seed_gives_the_same_bytes(data: TrainingSet) -> None:
    boosters = [bytes(train_all(data, LIMITS, PARAMETERS, seed).save_raw("ubj")) for seed in (SEED, SEED, SEED + 1)]
    assert boosters[0] == boosters[1]
    assert boosters[0] != boosters[2]


def test_order_of_the_measurements_does_not_change_the_booster(small_dataset: Dataset) -> None:
    boosters = {
        bytes(train_all(training_set(Dataset(rows), SPECS, PROFILES), LIMITS, PARAMETERS, SEED).save_raw("ubj"))
        for rows in (small_dataset.measurements, small_dataset.measurements[::-1])
    }
    assert len(boosters) == 1


def test_weighted_mape_by_hand() -> None:
    # Row 1: (|10-5|/10 + |20-30|/20)/2 = 0.5, weight 3; row 2: (|100-100|/100 + |50-40|/50)/2 = 0.1, weight 1.
    truth_ms, predicted_ms = np.array([[10.0, 20.0], [100.0, 50.0]]), np.array([[5.0, 30.0], [100.0, 40.0]])
    assert weighted_mape(truth_ms, predicted_ms, np.array([3.0, 1.0])) == pytest.approx((3 * 0.5 + 0.1) / 4)
    assert weighted_mape(truth_ms, predicted_ms, np.zeros(2)) == pytest.approx((0.5 + 0.1) / 2)


def test_no_row_of_other_rows_reaches_the_booster(data: TrainingSet) -> None:
    rows = data.llms != "llama-13b"
    wild = replace(data, latencies_ms=np.where(rows[:, np.newaxis], data.latencies_ms, 1e6))
    boosters = {bytes(fit(each, rows, np.ones(len(rows)), PARAMETERS, SEED).save_raw("ubj")) for each in (data, wild)}
    assert len(boosters) == 1


def _error_of_a_separate_training(
    data: TrainingSet, weights: NDArray[np.float64], parameters: Hyperparameters, left_out: str
) -> float:
    kept, scored = data.llms != left_out, data.llms == left_out
    booster = xgboost.train(
        {
            "objective": "reg:squarederror",
            "tree_method": "hist",
            "max_depth": parameters.max_depth,
            "eta": parameters.learning_rate,
            "subsample": parameters.subsample,
            "colsample_bytree": parameters.colsample_bytree,
            "monotone_constraints": (0,) * (len(data.schema.names) - 1) + (1,),
            "seed": SEED,
            "nthread": 1,
        },
        xgboost.DMatrix(data.features[kept], label=data.latencies_ms[kept], weight=weights[kept], nthread=1),
        num_boost_round=parameters.tree_count,
    )
    predicted = booster.predict(xgboost.DMatrix(data.features[scored], nthread=1))
    relative = [
        (abs(t[0] - p[0]) / t[0] + abs(t[1] - p[1]) / t[1]) / 2
        for t, p in zip(data.latencies_ms[scored].tolist(), predicted.tolist(), strict=True)
    ]
    return float(np.average(relative, weights=weights[scored]))


def test_choice_is_that_of_training_every_combination_separately(data: TrainingSet) -> None:
    """Also shows that the first trees of a long training are those of a short one."""
    weights = data.weights(LIMITS)
    errors = {}
    for trees, depth, rate in product(GRID.tree_counts, GRID.max_depths, GRID.learning_rates):
        parameters = Hyperparameters(
            tree_count=trees, max_depth=depth, learning_rate=rate, subsample=0.5, colsample_bytree=0.8
        )
        of_splits = [_error_of_a_separate_training(data, weights, parameters, llm) for llm in set(data.llms.tolist())]
        errors[parameters] = sum(of_splits) / len(of_splits)
    best = min(errors, key=errors.__getitem__)
    steps: list[tuple[int, int]] = []
    chosen, error = select_hyperparameters(
        data, LIMITS, grid=GRID, seed=SEED, progress=lambda done, total: steps.append((done, total))
    )
    assert chosen == best
    assert error == pytest.approx(errors[best], rel=1e-5)  # float32
    assert steps == [(done, 16) for done in range(1, 17)]  # 4 LLMs x 4 longest combinations


def test_grid_is_the_product_of_its_values() -> None:
    assert len(set(GRID.all())) == len(GRID.all()) == 3 * 2 * 2
    assert {parameters.tree_count for parameters in GRID.longest()} == {6}
    assert len(Grid().all()) == 4 * 4 * 2 * 3 * 2


specs = st.builds(
    LlmSpec,
    model_type=st.sampled_from(["llama", "t5", "gpt_neox", "never-seen"]),
    is_encoder_decoder=st.booleans(),
    parameter_count=st.integers(10**6, 10**12),
    layer_count=st.integers(1, 200),
    head_count=st.integers(1, 200),
    vocabulary_size=st.integers(1, 300_000),
    max_position_count=st.none() | st.integers(1, 10**6),
    uses_flash_attention=st.booleans(),
    relative_attention_max_distance=st.none() | st.just(128),
    relative_attention_bucket_count=st.none() | st.just(32),
    torch_dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)
profiles = st.sampled_from(tuple(PROFILES.values()))


@pytest.fixture(scope="module")
def deep_predictor(data: TrainingSet) -> XgboostPredictor:
    parameters = replace(PARAMETERS, tree_count=40, max_depth=8)
    booster = train_all(data, LIMITS, parameters, SEED)
    return XgboostPredictor(schema=data.schema, booster=booster, users_counts=tuple(range(1, 200)))


@given(spec=specs, profile=profiles)
def test_latencies_never_fall_as_users_are_added(
    deep_predictor: XgboostPredictor, bundled_predictor: XgboostPredictor, spec: LlmSpec, profile: GpuProfile
) -> None:
    for predictor in (deep_predictor, bundled_predictor):
        latencies = predictor.predict(spec, [profile])
        assert latencies.shape == (1, len(predictor.users_counts), 2)
        assert (np.diff(latencies, axis=1) >= 0).all()
        assert (latencies >= SMALLEST_LATENCY_MS).all()


@given(spec=specs, several=st.lists(profiles, min_size=1, max_size=4))
def test_prediction_for_a_profile_does_not_depend_on_the_others(
    bundled_predictor: XgboostPredictor, spec: LlmSpec, several: list[GpuProfile]
) -> None:
    together = bundled_predictor.predict(spec, several)
    alone = [bundled_predictor.predict(spec, [profile])[0] for profile in several]
    assert together.tolist() == [latencies.tolist() for latencies in alone]


def test_trees_that_undershoot_zero_are_lifted(data: TrainingSet, constant: Callable[[float], xgboost.Booster]) -> None:
    predictor = XgboostPredictor(schema=data.schema, booster=constant(-5.0), users_counts=(1, 2))
    latencies = predictor.predict(SPECS["llama-7b"], [PROFILES["1xT4-16GB"]])
    assert (latencies == SMALLEST_LATENCY_MS).all()


@pytest.fixture(scope="module")
def constant(data: TrainingSet) -> Callable[[float], xgboost.Booster]:
    def train(latency_ms: float) -> xgboost.Booster:
        labels = np.full_like(data.latencies_ms, latency_ms)
        return fit(replace(data, latencies_ms=labels), data.llms != "", np.ones(len(labels)), PARAMETERS, SEED)

    return train
