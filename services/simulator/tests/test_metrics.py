import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from llmpilot_perfmodel.batching.policies import Policy, TgisPolicy, Vllm0Policy, Vllm1Policy
from llmpilot_simulator.metrics import Histogram, Statistics, VllmCollector
from llmpilot_simulator.pace import FixedPace

BOUNDS = (0.001, 0.01, 0.1)
MILLISECOND = 1_000_000


def test_a_bound_counts_what_is_not_above_it() -> None:
    histogram = Histogram(BOUNDS)
    for duration in (1, 1, 2, 10, 11, 200):
        histogram.observe(duration * MILLISECOND)

    counts, total = histogram.samples()

    assert counts == [("0.001", 2), ("0.01", 4), ("0.1", 5), ("+Inf", 6)]
    assert total == pytest.approx(0.225)


@given(st.lists(st.sampled_from([0, 1, 5, 10, 10, 50, 1000])))
def test_counting_runs_at_once_changes_no_count(durations: list[int]) -> None:
    histogram = Histogram(BOUNDS)
    for duration in durations:
        histogram.observe(duration * MILLISECOND)

    counts, total = histogram.samples()

    assert [count for _, count in counts] == [
        sum(duration <= bound for duration in durations) for bound in (1, 10, 100, float("inf"))
    ]
    assert total == pytest.approx(sum(durations) / 1000)


def test_metrics_have_vllms_names_and_labels() -> None:
    """The names that vllm/v1/metrics/loggers.py registers, as a scraper sees them."""
    statistics = Statistics(prompt_tokens=7, generation_tokens=3)
    statistics.finished["length"] = 2
    registry = CollectorRegistry()
    pace = FixedPace(ttft_seconds=0, itl_seconds=0)
    registry.register(VllmCollector(model_id="m-simulated", statistics=statistics, load=pace))

    samples = {
        (sample.name, sample.labels.get("finished_reason")): sample
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }

    assert {name for name, _ in samples if name.startswith("vllm:")} == {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:num_preemptions_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:request_success_total",
        *(
            f"vllm:{histogram}_seconds_{part}"
            for histogram in ("time_to_first_token", "inter_token_latency", "e2e_request_latency")
            for part in ("bucket", "count", "sum")
        ),
    }
    assert samples["vllm:prompt_tokens_total", None].value == 7
    assert samples["vllm:request_success_total", "length"].value == 2
    assert samples["vllm:num_requests_running", None].labels == {"model_name": "m-simulated", "engine": "0"}


BLOCKS: list[tuple[Policy | None, set[tuple[str, str, str]]]] = [
    (Vllm1Policy(block_count=300), {("300", "16", "True")}),
    (Vllm0Policy(block_count=200, block_size=32), {("200", "32", "False")}),
    (TgisPolicy(max_batch_weight=4800), set()),
    (None, set()),
]


@pytest.mark.parametrize(("policy", "expected"), BLOCKS)
def test_the_blocks_of_the_cache_are_told_as_vllm_tells_them(
    policy: Policy | None, expected: set[tuple[str, str, str]]
) -> None:
    """As labels, which are text, of a number that is always 1; a server without blocks has no such number."""
    registry = CollectorRegistry()
    pace = FixedPace(ttft_seconds=0, itl_seconds=0)
    registry.register(VllmCollector(model_id="m", statistics=Statistics(), load=pace, policy=policy))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    samples = [sample for family in families for sample in family.samples if sample.name == "vllm:cache_config_info"]
    names = ("num_gpu_blocks", "block_size", "enable_prefix_caching")
    assert {tuple(sample.labels[name] for name in names) for sample in samples} == expected
    assert all(sample.value == 1 for sample in samples)
