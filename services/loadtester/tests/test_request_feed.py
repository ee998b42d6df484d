"""Requests on their way to workers: where they come from, who gets which, and when."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path

import pytest

from fmaas import generation_pb2
from llmpilot_contracts.errors import InvalidInputError, NotFoundError, PreconditionError, UnavailableError
from llmpilot_loadtester.domain.spec import (
    Load,
    LoadKind,
    PromptRequests,
    Protocol,
    SyntheticRequests,
    UserStep,
    WorkloadRequests,
)
from llmpilot_loadtester.supervision.request_feed import AHEAD_NANOS, RequestFeed
from llmpilot_loadtester.supervision.request_sources import (
    PromptSource,
    RequestSource,
    SourceRequest,
    SyntheticSource,
    stage_seed,
    synthetic_prompts,
)
from llmpilot_loadtester.wire_requests import Patience, WorkloadSource, with_single_prompts
from llmpilot_loadtester.worker_messages import Kind, MessageReader, QueuedRequest, unpack_requests
from llmpilot_servicekit.client import wait_until_serving
from llmpilot_servicekit.nats_server import start_nats_server

LIMIT_SECONDS = 60
MILLISECOND = 10**6


class Worker:
    """Takes what a feed sends to one worker, and says what it has sent when told to."""

    def __init__(self) -> None:
        self.requests: list[QueuedRequest] = []
        self.has_all = False
        self._reader = MessageReader()

    async def send(self, message: bytes) -> None:
        """Take a message."""
        for kind, payload in self._reader.feed(message):
            if kind is Kind.REQUESTS:
                self.requests += unpack_requests(payload)
            else:
                assert kind is Kind.NO_MORE_REQUESTS
                self.has_all = True

    @property
    def indices(self) -> list[int]:
        """Of the requests, in the order in which they came."""
        return [request.index for request in self.requests]


async def source_of(requests: Sequence[SourceRequest], *, is_endless: bool = False) -> AsyncIterator[SourceRequest]:
    while True:
        for request in requests:
            yield request
        if not is_endless:
            return


def endless(size_bytes: int = 10) -> AsyncIterator[SourceRequest]:
    return source_of([SourceRequest(body=bytes(size_bytes))], is_endless=True)


def users(count: int, *, request_count: int = 0) -> Load:
    return Load(
        kind=LoadKind.USERS,
        user_steps=(UserStep(at_seconds=0.0, users_count=count),),
        request_count=request_count,
    )


Scenario = Callable[[RequestFeed, list[Worker]], AsyncIterator[None]]


def feed(
    source: AsyncIterator[SourceRequest],
    load: Load,
    scenario: Scenario,
    *,
    users_counts: Sequence[int] = (1,),
    offsets: Iterator[int] | None = None,
    start_nanos: int | None = None,
) -> list[Worker]:
    """Feed workers; after each step of the scenario everything that can happen has happened."""
    workers = [Worker() for _ in users_counts]

    async def main() -> None:
        feed = RequestFeed(source, load, users_counts=users_counts, offsets=offsets)
        async with asyncio.timeout(LIMIT_SECONDS):
            tasks = [asyncio.create_task(feed.fill())]
            primed = asyncio.create_task(feed.primed())
            await asyncio.wait([*tasks, primed], return_when=asyncio.FIRST_COMPLETED)
            primed.cancel()
            feed.begin(time.time_ns() if start_nanos is None else start_nanos)
            tasks += [asyncio.create_task(feed.serve(number, worker.send)) for number, worker in enumerate(workers)]
            await settle(workers)
            async for _ in scenario(feed, workers):
                await settle(workers)
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result

    asyncio.run(main())
    return workers


async def settle(workers: Sequence[Worker]) -> None:
    """Let tasks run until nothing more is given."""
    before = None
    while before != (before := [(len(worker.requests), worker.has_all) for worker in workers]):
        for _ in range(200):
            await asyncio.sleep(0)


async def nothing_more(_: RequestFeed, __: list[Worker]) -> AsyncIterator[None]:
    return
    yield


@pytest.mark.parametrize(("users_count", "stock_count"), [(1, 64), (16, 64), (100, 400)])
def test_a_worker_of_a_closed_loop_has_four_requests_a_user_in_stock_and_at_least_64(
    users_count: int, stock_count: int
) -> None:
    (worker,) = feed(endless(), users(users_count), nothing_more, users_counts=[users_count])
    assert worker.indices == list(range(stock_count))
    assert {request.scheduled_nanos for request in worker.requests} == {-1}


def test_what_a_worker_has_sent_is_replaced() -> None:
    async def sends(feed: RequestFeed, workers: list[Worker]) -> AsyncIterator[None]:
        feed.note_sent(0, 10)
        yield
        assert len(workers[0].requests) == 74
        feed.note_sent(0, 10)  # the next pulse says the same
        yield
        assert len(workers[0].requests) == 74

    feed(endless(), users(1), sends)


def test_workers_of_a_closed_loop_share_the_requests_and_each_is_given_once() -> None:
    async def sends(feed: RequestFeed, _: list[Worker]) -> AsyncIterator[None]:
        for step in range(1, 6):
            feed.note_sent(0, 30 * step)  # one is faster
            feed.note_sent(1, 10 * step)
            yield

    first, second = feed(endless(), users(2), sends, users_counts=[1, 1])
    assert len(first.requests) == 64 + 150
    assert len(second.requests) == 64 + 50
    assert sorted(first.indices + second.indices) == list(range(64 + 150 + 64 + 50))


def test_large_requests_fill_a_worker_by_their_bytes() -> None:
    """16 MiB in stock and a message that may go beyond it by its last request."""
    (worker,) = feed(endless(512 << 10), users(100), nothing_more, users_counts=[100])
    assert len(worker.requests) == 32


def test_a_user_never_waits_for_bytes() -> None:
    """16 requests are in stock whatever they weigh."""
    (worker,) = feed(endless(2 << 20), users(100), nothing_more, users_counts=[100])
    assert len(worker.requests) == 16


def test_no_more_requests_than_asked_for_are_given_and_every_worker_is_told() -> None:
    first, second = feed(endless(), users(2, request_count=100), nothing_more, users_counts=[1, 1])
    assert sorted(first.indices + second.indices) == list(range(100))
    assert first.has_all
    assert second.has_all


def test_a_worker_has_sent_all_when_it_knows_that_there_are_no_more() -> None:
    async def sends(feed: RequestFeed, _: list[Worker]) -> AsyncIterator[None]:
        assert not feed.has_sent_all(0, 69)
        feed.note_sent(0, 60)
        yield
        assert not feed.has_sent_all(0, 69)
        assert feed.has_sent_all(0, 70)

    feed(endless(), users(1, request_count=70), sends)


def test_scheduled_requests_go_round_with_the_times_at_which_they_are_due() -> None:
    load = Load(kind=LoadKind.CONSTANT, rate_per_second=100, request_count=5)
    offsets = iter([0, 10, 20, 30, 40])
    first, second = feed(endless(), load, nothing_more, users_counts=[0, 0], offsets=offsets, start_nanos=10**18)
    assert [(request.index, request.scheduled_nanos - 10**18) for request in first.requests] == [
        (0, 0),
        (2, 20),
        (4, 40),
    ]
    assert [(request.index, request.scheduled_nanos - 10**18) for request in second.requests] == [(1, 10), (3, 30)]


def test_scheduled_requests_are_given_five_seconds_ahead() -> None:
    """A request every 10 ms, and time 0 is an hour away: up to 5 s after it."""
    load = Load(kind=LoadKind.CONSTANT, rate_per_second=100)
    offsets = iter(range(0, 10**12, 10 * MILLISECOND))
    in_an_hour = time.time_ns() + 3600 * 10**9
    (worker,) = feed(endless(), load, nothing_more, users_counts=[0], offsets=offsets, start_nanos=in_an_hour)
    assert AHEAD_NANOS == 5 * 10**9
    assert len(worker.requests) == 501


def test_all_at_once_is_given_whole_before_it_begins() -> None:
    load = Load(kind=LoadKind.ALL_AT_ONCE, request_count=40)
    (worker,) = feed(endless(2 << 20), load, nothing_more, users_counts=[0], offsets=iter([0] * 40), start_nanos=10**18)
    assert worker.indices == list(range(40))
    assert worker.has_all


def test_a_trace_is_sent_at_its_own_times_as_fast_as_asked() -> None:
    offsets = [0, 1_000, 1_000, 9_001]
    source = source_of([SourceRequest(body=b"x", arrival_offset_nanos=offset) for offset in offsets])
    (worker,) = feed(source, Load(kind=LoadKind.TRACE, speed=2.0), nothing_more, users_counts=[0], start_nanos=10**18)
    assert [request.scheduled_nanos - 10**18 for request in worker.requests] == [0, 500, 500, 4500]
    assert worker.has_all


def test_requests_without_times_are_no_trace() -> None:
    with pytest.raises(PreconditionError, match="no arrival times"):
        feed(endless(), Load(kind=LoadKind.TRACE), nothing_more, users_counts=[0])


def test_a_source_without_requests_is_an_error() -> None:
    with pytest.raises(PreconditionError, match="no requests to send"):
        feed(source_of([]), users(1), nothing_more)


def taken(source: RequestSource, count: int, *, stage_index: int = 0, served_model: str = "llm") -> list[SourceRequest]:
    """The first requests of a stage."""

    async def main() -> list[SourceRequest]:
        requests = source.requests(stage_index, served_model)
        found = []
        async with asyncio.timeout(LIMIT_SECONDS):
            async for request in requests:
                found.append(request)
                if len(found) == count:
                    break
        await requests.aclose()  # type: ignore[attr-defined]
        return found

    return asyncio.run(main())


def test_prompts_are_sent_in_order_and_again_from_the_first() -> None:
    jsonl = b"""{"prompt": "one", "output_tokens": 7, "input_tokens": 3}

{"body": {"prompt": "tw\\u00f6", "stream": true}}
"""
    source = PromptSource(requested=PromptRequests(jsonl=jsonl, output_tokens=9), protocol=Protocol.OPENAI_COMPLETIONS)
    first, second, third = taken(source, 3)
    body = json.loads(first.body)
    assert (body["model"], body["prompt"], body["max_tokens"], body["stream"]) == ("llm", "one", 7, True)
    assert first.input_tokens == 3
    assert json.loads(second.body) == {"prompt": "twö", "stream": True}
    assert second.input_tokens == -1
    assert third == first


def test_a_prompt_for_tgis_is_a_protobuf() -> None:
    source = PromptSource(requested=PromptRequests(jsonl=b'{"prompt": "one"}'), protocol=Protocol.TGIS)
    (request,) = taken(source, 1)
    message = generation_pb2.SingleGenerationRequest.FromString(request.body)
    assert (message.request.text, message.params.stopping.max_new_tokens) == ("one", 128)


def test_a_json_body_is_nothing_for_tgis() -> None:
    source = PromptSource(requested=PromptRequests(jsonl=b'{"body": {}}'), protocol=Protocol.TGIS)
    with pytest.raises(PreconditionError, match='give a "prompt"'):
        taken(source, 1)


def prompts(count: int, *, input_tokens: int = 20, seed: int = 0, stage_index: int = 0) -> list[str]:
    requested = SyntheticRequests(input_tokens=input_tokens, output_tokens=1, seed=seed)
    return list(islice(synthetic_prompts(requested, stage_index), count))


@pytest.mark.parametrize("input_tokens", [1, 2, 5, 6, 300])
def test_synthetic_prompts_have_as_many_words_as_asked(input_tokens: int) -> None:
    assert {len(prompt.split()) for prompt in prompts(10, input_tokens=input_tokens)} == {input_tokens}


def test_synthetic_prompts_are_the_same_again_for_the_same_seed_and_stage() -> None:
    assert prompts(300, seed=3, stage_index=2) == prompts(300, seed=3, stage_index=2)
    assert prompts(3, seed=3) != prompts(3, seed=4)


def test_no_two_synthetic_prompts_begin_with_the_same_five_words() -> None:
    """Across stages, too; and ones that follow each other differ from the first word on."""
    found = [prompt for stage_index in range(3) for prompt in prompts(2000, stage_index=stage_index)]
    assert len({tuple(prompt.split()[:5]) for prompt in found}) == len(found)
    assert all(before.split()[0] != after.split()[0] for before, after in pairwise(found[:2000]))


def test_synthetic_bodies_ask_for_the_whole_length() -> None:
    source = SyntheticSource(
        requested=SyntheticRequests(input_tokens=5, output_tokens=33), protocol=Protocol.OPENAI_COMPLETIONS
    )
    (request,) = taken(source, 1)
    body = json.loads(request.body)
    assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"]) == (33, 33, True)
    assert len(body["prompt"].split()) == 5


def test_stages_have_seeds_of_their_own_that_fit_into_64_bits() -> None:
    seeds = {stage_seed(2**64 - 1, stage_index) for stage_index in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert stage_seed(7, 0) == 7


class Generator:
    """`python -m llmpilot_workload_generator` as a process of its own, at one address for all its lives."""

    def __init__(self, folder: Path, nats_url: str) -> None:
        self._nats_url = nats_url
        self._address_file = folder / "address.json"
        self._log = folder / "log"
        self.address = "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        """Begin a life; returns when it serves."""
        self._address_file.unlink(missing_ok=True)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLMPILOT_")}
        environment = inherited | {
            "LLMPILOT_LISTEN": self.address,
            "LLMPILOT_ADDRESS_FILE": str(self._address_file),
            "LLMPILOT_NATS_URL": self._nats_url,
        }
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "llmpilot_workload_generator"]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + LIMIT_SECONDS
        while not self._address_file.exists():
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.address = json.loads(self._address_file.read_text())["grpc"]
        wait_until_serving(self.address, LIMIT_SECONDS)

    def kill(self) -> None:
        """End a life, at once."""
        self.process.kill()
        self.process.wait(LIMIT_SECONDS)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    with start_nats_server(tmp_path_factory.mktemp("nats")) as nats:
        generator = Generator(tmp_path_factory.mktemp("generator"), nats.url)
        try:
            yield generator
        finally:
            generator.kill()


def workload(
    address: str,
    model: str = "conversation",
    *,
    conditions: tuple[str, ...] = (),
    protocol: Protocol = Protocol.OPENAI_COMPLETIONS,
    keeps_arrivals: bool = False,
    patience: Patience | None = None,
) -> WorkloadSource:
    return WorkloadSource(
        requested=WorkloadRequests(workload_model=model, seed=5, conditions=conditions),
        address=address,
        protocol=protocol,
        keeps_arrivals=keeps_arrivals,
        patience=patience or Patience(),
    )


def test_the_generator_writes_bodies_for_the_target(generator: Generator) -> None:
    requests = taken(workload(generator.address, protocol=Protocol.OPENAI_CHAT), 5, served_model="my-llm")
    bodies = [json.loads(request.body) for request in requests]
    assert {body["model"] for body in bodies} == {"my-llm"}
    assert all(body["messages"][0]["content"] and body["min_tokens"] == body["max_tokens"] for body in bodies)
    assert all(request.input_tokens > 0 and request.arrival_offset_nanos is None for request in requests)


def test_the_generator_gives_a_stage_the_same_requests_again_and_other_stages_others(generator: Generator) -> None:
    source = workload(generator.address)
    first = taken(source, 20)
    assert taken(source, 20) == first
    assert not {request.body for request in taken(source, 20, stage_index=1)} & {request.body for request in first}


def test_requests_of_a_model_with_batches_have_one_prompt_each(generator: Generator) -> None:
    bodies = [json.loads(request.body) for request in taken(workload(generator.address, "production"), 100)]
    assert all(isinstance(body["prompt"], str) for body in bodies)


def test_for_tgis_every_request_is_one_call(generator: Generator) -> None:
    requests = taken(workload(generator.address, "production", protocol=Protocol.TGIS), 10)
    messages = [generation_pb2.SingleGenerationRequest.FromString(request.body) for request in requests]
    assert all(message.request.text and message.params.stopping.max_new_tokens for message in messages)


def test_a_trace_comes_with_its_times(generator: Generator) -> None:
    offsets = [request.arrival_offset_nanos for request in taken(workload(generator.address, keeps_arrivals=True), 50)]
    assert all(offset is not None for offset in offsets)
    assert offsets == sorted(offset for offset in offsets if offset is not None)


def test_an_unknown_profile_is_named(generator: Generator) -> None:
    with pytest.raises(NotFoundError, match="'workloadModels/nobody' not found"):
        taken(workload(generator.address, "nobody"), 1)


def test_what_is_wrong_is_told_by_the_fields_of_the_spec(generator: Generator) -> None:
    with pytest.raises(InvalidInputError) as raised:
        taken(workload(generator.address, conditions=("height > 3",)), 1)
    assert [violation.field for violation in raised.value.violations] == ["spec.workload.sampling.conditions"]


@pytest.mark.parametrize(
    ("conditions", "parameters", "expected"),
    [
        ((), {"input_tokens"}, []),
        ((), {"batch_size"}, ["batch_size = 1"]),
        (("input_tokens < 9",), {"batch_size"}, ["input_tokens < 9", "batch_size = 1"]),
        (("batch_size=4",), {"batch_size"}, ["batch_size=4"]),
        ((" batch_size <= 4",), {"batch_size"}, [" batch_size <= 4"]),
        (("batch_size_2 = 4",), {"batch_size"}, ["batch_size_2 = 4", "batch_size = 1"]),
    ],
)
def test_single_prompts_are_asked_for_unless_batches_are(
    conditions: tuple[str, ...], parameters: set[str], expected: list[str]
) -> None:
    assert with_single_prompts(conditions, parameters) == expected


def test_a_stream_goes_on_where_it_was_when_the_generator_comes_back(generator: Generator) -> None:
    source = workload(generator.address)
    expected = taken(source, 400)

    async def main() -> list[SourceRequest]:
        found = []
        async with asyncio.timeout(LIMIT_SECONDS):
            requests = source.requests(0, "llm")
            async for request in requests:
                found.append(request)
                if len(found) == 50:
                    generator.kill()
                    generator.start()
                if len(found) == 400:
                    break
            await requests.aclose()  # type: ignore[attr-defined]
        return found

    assert asyncio.run(main()) == expected


def test_a_generator_that_stays_away_is_one_clear_error() -> None:
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        message = rf"workload generator has not answered for \d+ s: check that it runs at {re.escape(address)}"
        with pytest.raises(UnavailableError, match=message):
            taken(workload(address, patience=Patience(away_seconds=0.3)), 1)
