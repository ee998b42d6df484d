"""What the servicer does with its threads; what it answers is in test_service*.py, over real gRPC."""

import asyncio
import threading
from importlib import resources
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from llmpilot.workload.v1 import workload_pb2 as pb
from llmpilot_contracts.errors import InvalidInputError
from llmpilot_contracts.subjects import WORKLOAD_MODELS
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_servicekit.nats_objects import NatsObjects
from llmpilot_servicekit.open_calls import OpenCalls
from llmpilot_workload_generator import servicer, wire_prompts
from llmpilot_workload_generator.model_creation import Creations
from llmpilot_workload_generator.model_store import ModelStore
from llmpilot_workload_generator.prompts.tokenizer import default_tokenizer

TIMEOUT_SECONDS = 30


def made_servicer() -> servicer.WorkloadServicer:
    """One without NATS, which has the profiles."""
    registry = CollectorRegistry()
    store = ModelStore(NatsObjects(NatsConnection("nats://127.0.0.1:1", streams=()), WORKLOAD_MODELS), registry)
    creations = Creations(traces=None, max_count=1, max_upload_bytes=1, idle_seconds=1)
    calls = OpenCalls(registry, metric="open_calls", description="Calls that last.")
    return servicer.WorkloadServicer(store, creations=creations, calls=calls, registry=registry)


def test_tokenizers_of_clients_that_vanished_are_tried_two_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread goes on when its call is cancelled; it must not make room for one more."""
    lock, hold = threading.Lock(), threading.Event()
    running = begun = most = asked = 0

    def slow(request: object, violations: object) -> None:  # noqa: ARG001 the signature of what it stands for
        nonlocal running, begun, most
        with lock:
            running, begun = running + 1, begun + 1
            most = max(most, running)
        assert hold.wait(TIMEOUT_SECONDS)
        with lock:
            running -= 1

    def counted(*_: object) -> None:
        nonlocal asked
        with lock:
            asked += 1

    monkeypatch.setattr(servicer, "_sampler", counted)  # what comes before
    monkeypatch.setattr(servicer, "_renderer", slow)
    request = pb.StreamRequestsRequest(sampling=pb.Sampling(workload_model="workloadModels/code"))

    async def check() -> None:
        made, context = made_servicer(), cast("Any", None)
        async with asyncio.timeout(TIMEOUT_SECONDS):
            gone = [asyncio.create_task(made.StreamRequests(request, context)) for _ in range(2)]
            while begun < 2:  # noqa: ASYNC110 counted in threads
                await asyncio.sleep(0)
            for call in gone:
                call.cancel()
            await asyncio.wait(gone)
            others = [asyncio.create_task(made.StreamRequests(request, context)) for _ in range(4)]
            while asked < 6:  # noqa: ASYNC110
                await asyncio.sleep(0)
            hold.set()
            await asyncio.wait(others)
            assert all(isinstance(call.exception(), InvalidInputError) for call in others)

    asyncio.run(check())
    assert begun == 6
    assert most == 2


def test_the_same_tokenizer_is_read_once() -> None:
    """While one is read nothing else runs: the library keeps Python's lock, for a second where it is large."""
    content = (resources.files("llmpilot_workload_generator") / "data" / "tokenizer.json").read_bytes()
    requests = [pb.StreamRequestsRequest(tokenizer_json=bytes(bytearray(content))) for _ in range(2)]
    first, second = (wire_prompts.read_render_options(request, []).tokenizer for request in requests)
    assert first is second
    assert first == default_tokenizer()
