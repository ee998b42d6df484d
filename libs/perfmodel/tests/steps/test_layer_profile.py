import csv
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.steps.layer_profile import LayerProfile, TensorParallelism, load_layer_profile
from llmpilot_perfmodel.steps.step_time import StepLoad, step_seconds

BLOCK_LAYERS = ("layernorm", "layernorm", "qkv_proj", "rotary_emb", "o_proj", "gate_up_proj", "act_fn", "down_proj")
"""What a decoder block of Llama runs besides attention, each as often as it does."""
GPUS = ("RTX4090", "RTXPRO6000")

Rows = list[tuple[object, ...]]

DENSE: Rows = [
    (layer, tokens, 10.0 * place + tokens)
    for place, layer in enumerate(("embedding", "final_layernorm", *dict.fromkeys(BLOCK_LAYERS)), start=1)
    for tokens in (1, 2, 4)
]
PER_SEQUENCE: Rows = [("lm_head", 1, 100.0), ("lm_head", 3, 120.0), ("sampler", 1, 5.0), ("sampler", 3, 9.0)]
ATTENTION: Rows = [
    (0, 0, 1, 16, 1.0),
    (0, 0, 1, 32, 2.0),
    (0, 0, 2, 16, 3.0),
    (0, 0, 2, 32, 5.0),
    (8, 0, 0, 0, 4.0),
    (8, 16, 0, 0, 6.0),
    (16, 0, 0, 0, 9.0),
    (16, 16, 0, 0, 11.0),
    *(
        (chunk, earlier, sequences, context, chunk + earlier + sequences * context)
        for chunk in (8, 16)
        for earlier in (0, 16)
        for sequences in (1, 2)
        for context in (16, 32)
    ),
]


def write(folder: Path, name: str, header: str, rows: Rows) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]))


def write_all(
    folder: Path, *, dense: Rows = DENSE, per_sequence: Rows = PER_SEQUENCE, attention: Rows = ATTENTION
) -> Path:
    write(folder, "dense.csv", "layer,tokens,time_us", dense)
    write(folder, "per_sequence.csv", "layer,sequences,time_us", per_sequence)
    write(folder, "attention.csv", "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us", attention)
    return folder


def attention_alone(folder: Path, attention: Rows) -> Path:
    """Write a profile whose other layers take next to no time."""
    dense: Rows = [(row[0], tokens, "0.000001") for row in DENSE[::3] for tokens in (1, 2)]
    return write_all(
        folder, dense=dense, per_sequence=[(*row[:2], "0.000001") for row in PER_SEQUENCE], attention=attention
    )


def violations(load: Callable[[], LayerProfile]) -> dict[str, str]:
    with pytest.raises(InvalidInputError) as caught:
        load()
    return {violation.field: violation.description for violation in caught.value.violations}


def step(chunk: int = 0, earlier: int = 0, sequences: int = 0, context: int = 0) -> StepLoad:
    pairs = chunk * earlier + chunk * (chunk + 1) / 2
    return StepLoad(int(chunk > 0), chunk, pairs, sequences, sequences * context)


def microseconds(profile: LayerProfile, load: StepLoad) -> float:
    return step_seconds(profile.tables, load) * 1e6


def dense_microseconds(tokens: float, layer_count: int) -> float:
    """The rows of DENSE by hand: 10, 20, then 30 (twice), 40, ..., 90; each layer adds a microsecond per token."""
    once = 10 + 20 + 2 * tokens
    block = 2 * 30 + 40 + 50 + 60 + 70 + 80 + 90 + 8 * tokens
    return once + layer_count * block


def test_a_step_is_the_sum_of_its_layers(tmp_path: Path) -> None:
    profile = load_layer_profile(write_all(tmp_path), layer_count=3)
    decode = dense_microseconds(2, 3) + (110 + 7) + 3 * 3.0
    assert microseconds(profile, step(sequences=2, context=16)) == pytest.approx(decode)
    prefill = dense_microseconds(8, 3) + (100 + 5) + 3 * 6.0
    assert microseconds(profile, step(chunk=8, earlier=16)) == pytest.approx(prefill)
    mixed = dense_microseconds(10, 3) + (120 + 9) + 3 * (8 + 16 + 2 * 32)
    assert microseconds(profile, step(chunk=8, earlier=16, sequences=2, context=32)) == pytest.approx(mixed)


def test_query_and_key_normalization_counts_where_it_was_measured(tmp_path: Path) -> None:
    plain = load_layer_profile(write_all(tmp_path / "a"), layer_count=2)
    extra: Rows = [("qk_norm", tokens, 7.0) for tokens in (1, 2, 4)]
    normalized = load_layer_profile(write_all(tmp_path / "b", dense=DENSE + extra), layer_count=2)
    load = step(sequences=1, context=16)
    assert microseconds(normalized, load) == pytest.approx(microseconds(plain, load) + 2 * 7)


def test_a_step_that_was_not_measured_lies_on_a_line_through_those_that_were(tmp_path: Path) -> None:
    """ATTENTION's mixed steps are linear; four sequences were measured without a prefill only."""
    left_out = [row for row in ATTENTION if row[:4] not in ((8, 16, 2, 32), (16, 0, 2, 16))]
    larger: Rows = [(0, 0, 4, 16, 7.0), (0, 0, 4, 32, 11.0), (32, 0, 0, 0, 20.0), (32, 16, 0, 0, 22.0)]
    larger += [(32, earlier, 1, context, 32 + earlier + context) for earlier in (0, 16) for context in (16, 32)]
    larger += [(32, earlier, 2, context, 32 + earlier + 2 * context) for earlier in (0, 16) for context in (16, 32)]
    profile = load_layer_profile(attention_alone(tmp_path, left_out + larger), layer_count=1)
    for chunk, earlier, sequences, context in ((16, 0, 2, 16), (8, 0, 4, 16), (16, 16, 4, 32), (24, 8, 3, 24)):
        expected = chunk + earlier + sequences * context
        assert microseconds(profile, step(chunk, earlier, sequences, context)) == pytest.approx(expected, abs=1e-3)


def test_all_reduces_add_what_the_ring_sends(tmp_path: Path) -> None:
    alone = load_layer_profile(write_all(tmp_path), layer_count=3)
    ring = TensorParallelism(gpu_count=4, bytes_per_second=1e9, hidden_size=1000, all_reduce_seconds=2e-6)
    together = load_layer_profile(tmp_path, layer_count=3, parallelism=ring)
    # 2 x 3/4 of 2 bytes x 1000 values x 2 tokens are 6,000 bytes, 6 us, plus 2 us; twice in each of three blocks
    load = step(sequences=2, context=16)
    assert microseconds(together, load) == pytest.approx(microseconds(alone, load) + 2 * 3 * (6 + 2))


def test_one_gpu_has_nothing_to_exchange(tmp_path: Path) -> None:
    alone = TensorParallelism(gpu_count=1, bytes_per_second=1e9, hidden_size=1000, all_reduce_seconds=1.0)
    load = step(sequences=2, context=16)
    with_one = load_layer_profile(write_all(tmp_path), layer_count=3, parallelism=alone)
    assert microseconds(with_one, load) == microseconds(load_layer_profile(tmp_path, layer_count=3), load)


def test_the_source_is_read_from_meta_yaml(tmp_path: Path) -> None:
    folder = write_all(tmp_path / "tp1")
    assert load_layer_profile(folder, layer_count=1).source == "layer profile without meta.yaml"
    (tmp_path / "meta.yaml").write_text(
        "vllm_version: 0.19.0\ngpu: NVIDIA X\nengine_effective:\n  model: /tmp/other\nprofiled_at: '2026-08-17'\n"
    )
    source = "unknown on NVIDIA X, layers timed in vLLM 0.19.0, 2026-08-17"
    assert load_layer_profile(folder, layer_count=1).source == source


def test_everything_wrong_with_all_files_and_arguments_is_listed(tmp_path: Path) -> None:
    wrong = TensorParallelism(gpu_count=0, bytes_per_second=0, hidden_size=0, all_reduce_seconds=-1)
    found = violations(lambda: load_layer_profile(tmp_path, layer_count=0, parallelism=wrong))
    files = {str(tmp_path / f"{name}.csv") for name in ("dense", "per_sequence", "attention")}
    arguments = {"gpu_count", "hidden_size", "bytes_per_second", "all_reduce_seconds", "layer_count"}
    assert set(found) == files | arguments
    assert all(found[file] == "cannot be read: No such file or directory" for file in files)


def test_missing_unknown_repeated_and_ragged_layers_are_refused(tmp_path: Path) -> None:
    dense = [row for row in DENSE if row[0] != "o_proj" and row[:2] != ("act_fn", 2)]
    head = [row for row in PER_SEQUENCE if row[0] != "sampler"]
    found = violations(lambda: load_layer_profile(write_all(tmp_path, dense=dense, per_sequence=head), layer_count=1))
    assert found == {
        f"{tmp_path / 'dense.csv'} o_proj": "layer is missing; measure it",
        f"{tmp_path / 'dense.csv'} act_fn": "lacks tokens 2, which other layers have; measure them",
        f"{tmp_path / 'per_sequence.csv'} sampler": "layer is missing; measure it",
    }
    dense = [*DENSE, ("moe", 1, 1.0), ("o_proj", 4, 1.0)]
    found = violations(lambda: load_layer_profile(write_all(tmp_path, dense=dense), layer_count=1))
    assert set(found) == {f"{tmp_path / 'dense.csv'} line 29, layer", f"{tmp_path / 'dense.csv'} line 30, tokens"}


@pytest.mark.parametrize("cell", ["nan", "inf", "-1", "0", "", "x"])
def test_a_time_that_is_none_is_refused(tmp_path: Path, cell: str) -> None:
    write_all(
        tmp_path,
        dense=[*DENSE[:-1], ("down_proj", 4, cell)],
        per_sequence=[*PER_SEQUENCE[:-1], ("sampler", 3, cell)],
        attention=[*ATTENTION[:-1], (16, 16, 2, 32, cell)],
    )
    found = violations(lambda: load_layer_profile(tmp_path, layer_count=1))
    lines = {"dense": 28, "per_sequence": 5, "attention": 25}
    assert set(found) == {f"{tmp_path / f'{name}.csv'} line {line}, time_us" for name, line in lines.items()}


def test_attention_steps_that_cannot_be_are_refused(tmp_path: Path) -> None:
    impossible: Rows = [(0, 0, 0, 0, 1.0), (0, 16, 1, 16, 1.0), (8, 0, 0, 16, 1.0), ATTENTION[0]]
    found = violations(lambda: load_layer_profile(write_all(tmp_path, attention=ATTENTION + impossible), layer_count=1))
    lines = [f"{tmp_path / 'attention.csv'} line {line}" for line in range(26, 30)]
    assert list(found) == lines
    assert found[lines[-1]] == "states a step a second time"


def test_a_table_with_too_little_attention_is_refused(tmp_path: Path) -> None:
    decode_only = [row for row in ATTENTION if row[0] == 0]
    found = violations(lambda: load_layer_profile(write_all(tmp_path, attention=decode_only), layer_count=1))
    assert set(found) == {
        f"{tmp_path / 'attention.csv'} {name}" for name in ("prefill only", "prefill_chunk", "kv_prefill")
    }
    sparse: Rows = [
        *(row for row in ATTENTION if row[0] == 0 or row[2] == 0),
        *((2**power, 2**power, power, 2**power, 1.0) for power in range(5, 12)),
    ]
    found = violations(lambda: load_layer_profile(write_all(tmp_path, attention=sparse), layer_count=1))
    assert list(found) == [str(tmp_path / "attention.csv")]
    assert "of the grid is measured; measure more of it" in found[str(tmp_path / "attention.csv")]


def profile_folder(public_data: Path, gpu: str) -> Path:
    return public_data / "layer-profiles" / gpu / "Llama-3.1-8B" / "tp1"


@cache
def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def curve_at(path: Path, layer: str, axis: str, place: float) -> float:
    points = [(float(row[axis]), float(row["time_us"])) for row in rows_of(path) if row["layer"] == layer]
    return float(np.interp(place, [node for node, _ in points], [value for _, value in points]))


@pytest.mark.parametrize("gpu", GPUS)
def test_a_measured_step_costs_what_was_measured(public_data: Path, gpu: str) -> None:
    """200 measured attention times of each kind, plus the other layers as numpy interpolates them."""
    folder = profile_folder(public_data, gpu)
    profile = load_layer_profile(folder, layer_count=32)
    generator = np.random.default_rng(1)
    numbers = np.array([[float(cell) for cell in row.values()] for row in rows_of(folder / "attention.csv")])
    kinds = (numbers[:, 0] == 0, numbers[:, 2] == 0, (numbers[:, 0] > 0) & (numbers[:, 2] > 0))
    curves: dict[tuple[str, float], float] = {}
    for row in np.concatenate([generator.permutation(numbers[kind])[:70] for kind in kinds]):
        chunk, earlier, sequences, context = (int(number) for number in row[:4])
        tokens, results = chunk + sequences, int(chunk > 0) + sequences
        if tokens > 2048 or results > 256:
            continue
        expected = 32 * row[4]
        for layer in ("embedding", "final_layernorm"):
            expected += curves.setdefault((layer, tokens), curve_at(folder / "dense.csv", layer, "tokens", tokens))
        for layer in BLOCK_LAYERS:
            expected += 32 * curves.setdefault((layer, tokens), curve_at(folder / "dense.csv", layer, "tokens", tokens))
        for layer in ("lm_head", "sampler"):
            path = folder / "per_sequence.csv"
            expected += curves.setdefault((layer, results), curve_at(path, layer, "sequences", results))
        assert microseconds(profile, step(chunk, earlier, sequences, context)) == pytest.approx(expected, rel=1e-9)


def test_steps_between_the_nodes_are_predicted(public_data: Path, tmp_path: Path) -> None:
    """The RTXPRO6000's table has two grids; the one of powers of two predicts the attention times of the other one."""
    path = profile_folder(public_data, "RTXPRO6000") / "attention.csv"
    rows = [([int(cell) for cell in list(row.values())[:4]], float(row["time_us"])) for row in rows_of(path)]
    powers = {0, *(2**power for power in range(15))}
    coarse: Rows = [(*place, measured) for place, measured in rows if powers.issuperset(place)]
    others = [row for row in rows if not powers.issuperset(row[0])]
    profile = load_layer_profile(attention_alone(tmp_path, coarse), layer_count=1)
    errors = np.array([microseconds(profile, step(*place)) / measured - 1 for place, measured in others])
    assert len(errors) > 10_000
    assert abs(errors.mean()) < 0.005
    assert np.abs(errors).mean() < 0.04  # measured three times each, clocks vary by a few percent
