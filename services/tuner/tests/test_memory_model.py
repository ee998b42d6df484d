"""The formulas of `step_memory` against what PyTorch's CPU allocator gives out for the same step, byte for byte.

Decode steps in 16 bits are in float16 here: for bfloat16 oneDNN takes scratch space of its own, which no formula knows.
"""

import contextlib
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmpilot_perfmodel.llm_config import parse_llm
from llmpilot_perfmodel.step_memory.batch import Attention, Batch, Execution, Layout, Rows
from llmpilot_perfmodel.step_memory.peak import step_memory

torch: Any = pytest.importorskip("torch", reason="the steps run in PyTorch")

from torch.profiler import ProfilerActivity, profile  # noqa: E402 only where there is PyTorch

from llmpilot_tuner.torch_worker.forward import StepRunner  # noqa: E402

TINY_LLM: Callable[..., str] = runpy.run_path(str(Path(__file__).with_name("tiny_llms.py")))["tiny_llm"]
DECODERS = ("llama-mha", "llama-gqa", "gpt-neox", "gpt-bigcode", "mixtral")
LARGEST_ERROR = 0.001
"""Of a step: what the formulas leave out is tensors of a few numbers."""


def rows(request_count: int, input_tokens: int, output_tokens: int = 1, context_tokens: int = 0) -> Rows:
    return Rows(
        request_count=request_count,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        context_tokens=context_tokens,
    )


PREFILLS = [Batch(case="prefill", prefill=(rows(n, tokens),)) for n, tokens in ((1, 128), (13, 61), (50, 10))]
DECODE = Batch(case="decode", decode=(rows(40, 124, 4),))
MIXED = Batch(case="mixed", prefill=(rows(3, 100), rows(1, 40)), decode=(rows(8, 100, 20),), copied_tokens=300)
RESIDENTS = Batch(case="residents", prefill=(rows(3, 100),), residents=(rows(8, 100, 20),))
ALL_LOGITS = Batch(case="all_logits", prefill=(rows(3, 100),), all_logits=True)
CHUNK = Batch(case="chunk", prefill=(rows(1, 100, 1, 300),), decode=(rows(8, 100, 20),), pool_tokens=4000)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what the profiler's library writes to the standard error stream of the process."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def allocated_bytes(runner: StepRunner, batch: Batch) -> int:
    """Return the most bytes that the allocator has given out at once; in its first run a kernel packs weights."""
    runner.run(batch)
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        runner.run(batch)
    live = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def runner_of(text: str, execution: Execution) -> StepRunner:
    runner = StepRunner(config_json=text, model_folder=None, execution=execution, device="cpu")
    runner.load()
    return runner


def errors(text: str, execution: Execution, batches: list[Batch]) -> dict[str, float]:
    """Return what the formulas are off by, as a share of the real bytes."""
    llm, runner = parse_llm(text), runner_of(text, execution)
    found = {}
    for batch in batches:
        memory = step_memory(llm, batch, execution)
        assert memory.weight_bytes == runner.weight_bytes
        real = allocated_bytes(runner, batch)
        found[f"{batch.case} {memory.phase} {batch.request_count}"] = (
            memory.cache_bytes + memory.working_bytes - real
        ) / real
    return found


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_right(text: str, execution: Execution, batches: list[Batch]) -> None:
    wrong = {step: error for step, error in errors(text, execution, batches).items() if abs(error) > LARGEST_ERROR}
    assert wrong == {}


@pytest.mark.parametrize("attention", Attention)
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("name", DECODERS)
def test_decoder_steps_take_what_the_formulas_say(name: str, layout: Layout, attention: Attention) -> None:
    execution = Execution(layout=layout, attention=attention, activation_bits=32)
    chunk = [CHUNK] if layout is Layout.PACKED else []
    assert_right(TINY_LLM(name), execution, [*PREFILLS[1:], DECODE, MIXED, *chunk])


@pytest.mark.parametrize("attention", Attention)
@pytest.mark.parametrize("layout", Layout)
def test_decoder_steps_in_16_bits_take_what_the_formulas_say(layout: Layout, attention: Attention) -> None:
    execution = Execution(layout=layout, attention=attention, activation_bits=16)
    assert_right(TINY_LLM("llama-gqa"), execution, [PREFILLS[0], RESIDENTS, DECODE])


@pytest.mark.parametrize("name", ["llama-gqa", "gpt-bigcode"])
@pytest.mark.parametrize("layout", Layout)
def test_what_is_read_in_bfloat16_takes_what_the_formulas_say(layout: Layout, name: str) -> None:
    """Also where the last tokens of several requests, which do not lie together, enter the head."""
    execution = Execution(layout=layout, activation_bits=16)
    assert_right(TINY_LLM(name, torch_dtype="bfloat16", vocab_size=8192), execution, [*PREFILLS[1:], RESIDENTS])


@pytest.mark.parametrize("layout", Layout)
def test_log_probabilities_of_a_large_vocabulary_take_what_the_formulas_say(layout: Layout) -> None:
    for bits in (32, 16):
        execution = Execution(layout=layout, activation_bits=bits)
        off = errors(TINY_LLM("llama-gqa", vocab_size=8192), execution, [ALL_LOGITS])
        assert list(off) == ["all_logits log-probabilities 3"]
        assert max(map(abs, off.values())) <= LARGEST_ERROR


@pytest.mark.parametrize("attention", Attention)
@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_t5_steps_take_what_the_formulas_say(attention: Attention, bits: int, feed_forward: str) -> None:
    execution = Execution(layout=Layout.PADDED, attention=attention, activation_bits=bits)
    text = TINY_LLM("t5", feed_forward_proj=feed_forward, d_ff=1024)
    assert_right(text, execution, [*PREFILLS, DECODE, MIXED, RESIDENTS] if bits == 32 else [PREFILLS[2], DECODE])


@pytest.mark.parametrize("name", [*DECODERS, "t5"])
def test_a_part_of_an_llm_takes_what_the_formulas_say(name: str) -> None:
    layout = Layout.PADDED if name == "t5" else Layout.PACKED
    execution = Execution(layout=layout, gpu_count=2, activation_bits=32)
    assert_right(TINY_LLM(name), execution, [PREFILLS[1], DECODE])
