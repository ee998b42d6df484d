"""What every meter does with an order: it builds the LLM, warms it up, and says what ran."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from llmpilot_contracts.errors import PreconditionError
from llmpilot_perfmodel.step_memory.batch import Batch, Execution, Layout, Rows
from llmpilot_tuner.probes.worker_messages import Order
from llmpilot_tuner.torch_worker.failures import FailureKind, classify_exception
from llmpilot_tuner.torch_worker.forward import StepRunner
from llmpilot_tuner.torch_worker.sharding import Collective

_WARM_TOKENS = 64
"""Enough for libraries to make the buffers that they keep, few enough for any LLM and any capacity."""


class LoneCollective:
    """A rank that is alone, or plays to be: what it would hear of others is what it says itself."""

    def all_reduce(self, tensor: Any) -> None:
        """Leave the tensor as it is, which takes the same memory."""

    def barrier(self) -> None:
        """Wait for nobody."""


def runner_of(order: Order, device: str, collective: Collective) -> StepRunner:
    """Return what runs the steps of an order; nothing is loaded yet."""
    return StepRunner(
        config_json=order.config_json,
        model_folder=Path(order.model_folder) if order.model_folder else None,
        execution=order.execution,
        device=device,
        rank=order.rank,
        collective=collective if order.execution.gpu_count > 1 else None,
        seed=order.seed,
    )


@contextmanager
def must_fit(order: Order, *, on_gpu: bool = False) -> Iterator[None]:
    """Raise PreconditionError where what happens inside, loading and the smallest step, runs out of memory."""
    try:
        yield
    except RuntimeError as error:
        failure = classify_exception(error, on_gpu=on_gpu)
        if failure.kind is not FailureKind.OUT_OF_MEMORY:
            raise
        raise PreconditionError(
            f"the weights and the smallest step do not fit into the {order.capacity_bytes:,} bytes that "
            f"each GPU may use: {failure.message}"
        ) from error


def warm_up_batches(execution: Execution) -> tuple[Batch, ...]:
    """Return small steps of both kinds: what libraries allocate once and keep, they allocate now."""
    reading = Rows(request_count=2, input_tokens=_WARM_TOKENS, output_tokens=1)
    writing = Rows(request_count=2, input_tokens=_WARM_TOKENS, output_tokens=2)
    pool_tokens = 2 * reading.token_count + 2 * writing.token_count if execution.layout is Layout.PACKED else 0
    return (
        Batch(case="warm-up", prefill=(reading,), pool_tokens=pool_tokens),
        Batch(case="warm-up", decode=(writing,), pool_tokens=pool_tokens),
    )


def check_weights_fit(order: Order, weight_bytes: int) -> None:
    """Raise PreconditionError where the weights leave nothing for a step."""
    if weight_bytes >= order.capacity_bytes:
        raise weights_do_not_fit(weight_bytes, order.capacity_bytes)


def weights_do_not_fit(weight_bytes: int, capacity_bytes: int) -> PreconditionError:
    """Return the error that says by how much the weights are too large."""
    return PreconditionError(
        f"the weights alone take {weight_bytes:,} bytes of each GPU and it may use {capacity_bytes:,}: "
        f"{weight_bytes - capacity_bytes:,} too many; take more GPUs per pod, a larger GPU or fewer bits"
    )


def library_versions() -> list[tuple[str, str]]:
    """Return what ran, but for the driver."""
    python = ".".join(map(str, sys.version_info[:3]))
    return [("torch", str(torch.__version__)), ("transformers", str(transformers.__version__)), ("python", python)]
