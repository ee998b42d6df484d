"""Compares the formulas of `step_memory` with what PyTorch's CPU allocator gives out for the same step.

    OMP_NUM_THREADS=1 python benchmarks/tuner_memory_model.py [LLM ...]

Every step runs through the tuner's StepRunner. "real" is the most bytes that the allocator had given out at once above
the weights, from the profiler's memory events, of the second run: in the first kernels pack weights. "tensors" is the
same of tensors alone, counted storage by storage, and only measured where the formula is off by more than 0.1 %: what
it has less than "real" is scratch space inside kernels (oneDNN's for bfloat16, the block buffers of flash attention on
CPUs), which no formula counts. Formula and real are without weights; those have a row of their own.
"""

import contextlib
import json
import os
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmpilot_perfmodel.llm_config import LlmConfig, parse_llm
from llmpilot_perfmodel.step_memory.batch import Attention, Batch, Execution, Layout, Rows
from llmpilot_perfmodel.step_memory.peak import step_memory
from llmpilot_tuner.torch_worker.forward import StepRunner

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
GPT = {
    "n_embd": 256,
    "n_inner": 1024,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 2048,
    "vocab_size": 4096,
}
T5 = {
    "model_type": "t5",
    "d_model": 256,
    "d_ff": 1024,
    "d_kv": 64,
    "num_heads": 4,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "vocab_size": 4096,
    "feed_forward_proj": "relu",
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
LLMS: dict[str, dict[str, object]] = {
    "llama-mha": LLAMA,
    "llama-gqa": LLAMA | {"num_key_value_heads": 2},
    "gpt-neox": LLAMA | {"model_type": "gpt_neox", "intermediate_size": 1024, "rotary_pct": 0.25},
    "starcoder": GPT | {"model_type": "gpt_bigcode", "multi_query": True},
    "mixtral": LLAMA
    | {
        "model_type": "mixtral",
        "intermediate_size": 512,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "t5": T5,
    "t5-gated": T5 | {"feed_forward_proj": "gated-gelu"},
}
SHAPES = ((1, 512), (4, 192), (13, 61), (50, 10))
LARGE_ERROR = 0.1
DTYPES = {"float32": 32, "float16": 16, "bfloat16": 16}


def main(names: list[str]) -> None:
    """Print a row for every step, and a summary."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    print(
        f"{'LLM':10} {'layout':7} {'attention':9} {'dtype':9} {'step':15} {'formula':>11} {'real':>11} {'error %':>8}"
    )
    errors: dict[tuple[str, str, str], list[float]] = {}
    for name in names or LLMS:
        for dtype in DTYPES:
            for row in compare(name, dtype):
                print(row.text(), flush=True)
                errors.setdefault((name, dtype, row.kind), []).append(row.error)
    print(f"\n{'LLM':10} {'dtype':9} {'step':10} {'steps':>5} {'mean |error| %':>15} {'largest %':>10}")
    for (name, dtype, kind), found in errors.items():
        worst = max(found, key=abs)
        print(f"{name:10} {dtype:9} {kind:10} {len(found):5} {statistics.mean(map(abs, found)):15.4f} {worst:+10.4f}")
    print(f"\n{sum(map(len, errors.values()))} steps in {time.perf_counter() - started:.0f} s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One step, or the weights."""

    llm: str
    dtype: str
    step: str
    execution: Execution | None = None
    """None: the weights, which all have in common."""
    formula_bytes: float = 0
    real_bytes: int = 0
    tensor_bytes: int | None = None

    @property
    def kind(self) -> str:
        """The step without its shape."""
        return self.step.split()[0]

    @property
    def error(self) -> float:
        """Of the formula, in percent."""
        return 100 * (self.formula_bytes - self.real_bytes) / self.real_bytes

    def text(self) -> str:
        """The row of the table."""
        layout, attention = (self.execution.layout, self.execution.attention) if self.execution else ("", "")
        numbers = f"{self.formula_bytes:11.0f} {self.real_bytes:11} {self.error:+8.3f}"
        tensors = "" if self.tensor_bytes is None else f"  tensors {self.tensor_bytes}"
        return f"{self.llm:10} {layout:7} {attention:9} {self.dtype:9} {self.step:15} {numbers}{tensors}"


def compare(name: str, dtype: str) -> Iterator[Row]:
    """Yield a row for the weights and for every step that the LLM can make."""
    text = json.dumps(LLMS[name] | {"torch_dtype": dtype})
    config = parse_llm(text)
    layouts = [Layout.PADDED] if config.spec.is_encoder_decoder else list(Layout)
    for layout in layouts:
        for attention in [Attention.FUSED] if dtype == "float16" else Attention:  # its products are slow on CPUs
            execution = Execution(layout=layout, attention=attention, activation_bits=DTYPES[dtype])
            runner = StepRunner(config_json=text, model_folder=None, execution=execution, device="cpu")
            runner.load()
            if layout is layouts[0] and attention is Attention.FUSED:
                yield weights_row(name, dtype, config, execution, runner)
            for step, batch in steps():
                yield step_row(
                    Row(llm=name, dtype=dtype, execution=execution, step=step), config, execution, batch, runner
                )


def weights_row(name: str, dtype: str, config: LlmConfig, execution: Execution, runner: StepRunner) -> Row:
    """Compare the weights."""
    formula_bytes = step_memory(config, Batch(case="idle"), execution).weight_bytes
    return Row(llm=name, dtype=dtype, step="weights", formula_bytes=formula_bytes, real_bytes=runner.weight_bytes)


def step_row(row: Row, config: LlmConfig, execution: Execution, batch: Batch, runner: StepRunner) -> Row:
    """Compare a step."""
    memory = step_memory(config, batch, execution)
    formula_bytes = memory.total_bytes - memory.weight_bytes
    real_bytes = allocated_bytes(lambda: runner.run(batch))
    found = replace(row, formula_bytes=formula_bytes, real_bytes=real_bytes)
    if abs(found.error) <= LARGE_ERROR:
        return found
    weights = [*runner.loaded.model.parameters(), *runner.loaded.model.buffers()]
    return replace(found, tensor_bytes=stored_bytes(lambda: runner.run(batch), weights))


def steps() -> Iterator[tuple[str, Batch]]:
    """Yield steps of every kind."""
    for n, tokens in SHAPES:
        rows = Rows(request_count=n, input_tokens=tokens, output_tokens=1)
        yield f"prefill {n}x{tokens}", Batch(case="prefill", prefill=(rows,))
    for n, tokens in SHAPES:
        rows = Rows(request_count=n, input_tokens=tokens - 4, output_tokens=4)
        yield f"decode {n}x{tokens}", Batch(case="decode", decode=(rows,))
    reading = Rows(request_count=3, input_tokens=100, output_tokens=1)
    making = Rows(request_count=8, input_tokens=100, output_tokens=20)
    yield "mixed", Batch(case="mixed", prefill=(reading,), decode=(making,), copied_tokens=300)
    yield "residents", Batch(case="residents", prefill=(reading,), residents=(making,))


def allocated_bytes(run: Callable[[], None]) -> int:
    """Return the most bytes that the CPU's allocator has given out at once, of a second run."""
    run()
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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


def stored_bytes(run: Callable[[], None], weights: list[Any]) -> int:
    """Return the most bytes that tensors had at once, weights not counted."""
    storages = _Storages(weights)
    with storages:
        run()
    return storages.most


class _Storages(TorchDispatchMode):  # type: ignore[misc]
    """Counts storages from the operation that makes them until nothing refers to them."""

    def __init__(self, weights: list[Any]) -> None:
        super().__init__()
        self.live = self.most = 0
        self._seen = {weight.untyped_storage()._cdata for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


if __name__ == "__main__":
    main(sys.argv[1:])
