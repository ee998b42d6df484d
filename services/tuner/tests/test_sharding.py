import gc
import runpy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the extra llm-pilot-tuner[torch] is not installed")

from torch import Tensor  # noqa: E402

from llmpilot_contracts.errors import PreconditionError  # noqa: E402
from llmpilot_perfmodel.step_memory.batch import Batch, Execution, Layout, Rows  # noqa: E402
from llmpilot_tuner.torch_worker.forward import StepRunner  # noqa: E402
from llmpilot_tuner.torch_worker.sharding import Shards, key_value_heads_of_rank  # noqa: E402

_TINY = runpy.run_path(str(Path(__file__).parent / "tiny_llms.py"))
TINY_LLMS, tiny_llm = _TINY["TINY_LLMS"], _TINY["tiny_llm"]
WAIT_SECONDS = 60
PACKED_BATCH = Batch(
    case="mixed",
    prefill=(Rows(request_count=2, input_tokens=7, output_tokens=1),),
    decode=(Rows(request_count=3, input_tokens=6, output_tokens=2),),
)


class ThreadCollective:
    """Ranks that are threads of one process: the sum is taken where all have brought their part."""

    def __init__(self, count: int) -> None:
        self._parts: list[Tensor] = []
        self._lock = threading.Lock()
        self._gate = threading.Barrier(count)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum in place."""
        with self._lock:
            self._parts.append(tensor.clone())
        self._gate.wait(WAIT_SECONDS)
        total = sum(self._parts[1:], self._parts[0])
        self._gate.wait(WAIT_SECONDS)
        self._parts.clear()
        tensor.copy_(total)
        self._gate.wait(WAIT_SECONDS)

    def barrier(self) -> None:
        """Wait for all."""
        self._gate.wait(WAIT_SECONDS)


def layout_of(name: str) -> Layout:
    return Layout.PADDED if name == "t5" else Layout.PACKED


def stored(name: str, folder: Path, config: str) -> StepRunner:
    """Write a model with random weights to a folder and return its runner."""
    whole = StepRunner(
        config_json=config,
        model_folder=None,
        execution=Execution(layout=layout_of(name), activation_bits=32),
        device="cpu",
        seed=7,
    )
    whole.load()
    whole.loaded.model.save_pretrained(folder)
    return whole


def parts(name: str, folder: Path, config: str, count: int) -> list[StepRunner]:
    """Load every rank of a tensor-parallel LLM."""
    collective = ThreadCollective(count)
    execution = Execution(layout=layout_of(name), activation_bits=32, gpu_count=count)
    ranks = [
        StepRunner(
            config_json=config,
            model_folder=folder,
            execution=execution,
            device="cpu",
            rank=rank,
            collective=collective,
            seed=7,
        )
        for rank in range(count)
    ]
    for rank in ranks:
        rank.load()
    return ranks


@pytest.mark.parametrize(
    ("name", "count"),
    [*((name, 2) for name in TINY_LLMS), ("llama-gqa", 4), ("gpt-bigcode", 4)],
)
def test_the_ranks_together_compute_what_one_gpu_computes(name: str, count: int, tmp_path: Path) -> None:
    """Also where there are more ranks than key/value heads, so that several hold the same one."""
    batch = PACKED_BATCH
    config = TINY_LLMS[name]
    whole = stored(name, tmp_path, config)
    ranks = parts(name, tmp_path, config, count)
    expected = whole.step(batch)
    with ThreadPoolExecutor(count) as pool:
        outputs = list(pool.map(lambda rank: rank.step(batch), ranks))
    for output in outputs:
        for got, want in zip(output.logits, expected.logits, strict=True):
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_two_ranks_of_a_llama_hold_half_of_every_matrix_and_all_norms(tmp_path: Path) -> None:
    config = TINY_LLMS["llama-mha"]
    whole = stored("llama-mha", tmp_path, config)
    ranks = parts("llama-mha", tmp_path, config, 2)
    norms = (2 * 4 + 1) * 128 * 4  # two per layer and one at the end, 128 wide, of four bytes
    assert [rank.weight_bytes for rank in ranks] == [(whole.weight_bytes - norms) // 2 + norms] * 2


@pytest.mark.parametrize("name", ["mixtral", "gpt-neox"])
def test_of_weights_that_were_cut_nothing_else_stays_alive(name: str, tmp_path: Path) -> None:
    stored(name, tmp_path, TINY_LLMS[name])
    gc.collect()
    before = {id(thing) for thing in gc.get_objects() if type(thing) is torch.nn.Parameter}
    rank, _ = parts(name, tmp_path, TINY_LLMS[name], 2)
    gc.collect()
    made = {id(thing): thing for thing in gc.get_objects() if type(thing) is torch.nn.Parameter}
    assert sum(made[one].nbytes for one in made if one not in before) == 2 * rank.weight_bytes


def test_random_parts_take_the_memory_of_real_ones(tmp_path: Path) -> None:
    config = TINY_LLMS["mixtral"]
    stored("mixtral", tmp_path, config)
    real = parts("mixtral", tmp_path, config, 2)
    made_up = StepRunner(
        config_json=config,
        model_folder=None,
        execution=Execution(layout=Layout.PACKED, activation_bits=32, gpu_count=2),
        device="cpu",
    )
    made_up.load()
    made_up.run(PACKED_BATCH)  # nobody else is there: sums are those of this rank
    assert made_up.weight_bytes == real[0].weight_bytes


@pytest.mark.parametrize(("head_count", "count"), [(8, 2), (8, 8), (2, 8), (1, 4), (3, 6)])
def test_key_value_heads_go_to_ranks_whose_query_heads_read_them(head_count: int, count: int) -> None:
    """Query head q reads key/value head q // group; the ranks share the query heads in order."""
    query_heads = 24 if head_count == 3 else 8
    group = query_heads // head_count
    for rank in range(count):
        own = range(rank * query_heads // count, (rank + 1) * query_heads // count)
        needed = {query_head // group for query_head in own}
        assert set(key_value_heads_of_rank(head_count, Shards(rank=rank, count=count))) == needed


@pytest.mark.parametrize(
    ("name", "count", "word"),
    [("llama-mha", 3, "8 heads"), ("llama-mha", 16, "8 heads"), ("t5", 3, "8 heads")],
)
def test_what_does_not_divide_is_refused_with_what_to_do(name: str, count: int, word: str) -> None:
    execution = Execution(layout=layout_of(name), gpu_count=count)
    runner = StepRunner(config_json=TINY_LLMS[name], model_folder=None, execution=execution, device="cpu")
    with pytest.raises(PreconditionError, match=f"{word}.*another number of GPUs"):
        runner.load()


def test_a_family_without_a_plan_is_refused() -> None:
    config = tiny_llm("llama-mha", model_type="gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=16)
    execution = Execution(layout=Layout.PACKED, gpu_count=2)
    runner = StepRunner(config_json=config, model_folder=None, execution=execution, device="cpu")
    with pytest.raises(PreconditionError, match=r"gpt_oss.*cannot be cut"):
        runner.load()
