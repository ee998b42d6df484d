"""Replies become records in the background of gevent's loop; here without any network."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import gevent
import numpy as np
import pytest

from llmpilot_contracts.record_schema import TOKEN_COUNT_SOURCES, problems
from llmpilot_loadtester.domain.record_frames import unpack_records
from llmpilot_loadtester.domain.records import REQUEST_COLUMNS, RecordBatch, joined
from llmpilot_loadtester.domain.spec import Target
from llmpilot_loadtester.engine import recorder as recorder_module
from llmpilot_loadtester.engine.client import Generation
from llmpilot_loadtester.engine.connection import RawReply
from llmpilot_loadtester.engine.health import LagHistogram
from llmpilot_loadtester.engine.recorder import EndedRequest, Recorder, coalesced_count
from llmpilot_loadtester.protocols.http1 import HttpAdapter
from llmpilot_loadtester.protocols.reply import Received, Reply, go_on

START = 1_800_000_000_000_000_000


class SaidReplies(HttpAdapter):
    """An adapter whose replies are given."""

    def __init__(self, reply: Reply | Exception) -> None:
        super().__init__(Target(url="http://nowhere"), "/", self._say)
        self.read_count = 0
        self._reply = reply

    def _say(self, _: Received) -> Reply:
        self.read_count += 1
        if isinstance(self._reply, Exception):
            raise self._reply
        return self._reply


class Frames:
    """What a recorder gave away."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.counts: list[int] = []

    def take(self, frame: bytes, count: int) -> None:
        """A sink."""
        self.frames.append(frame)
        self.counts.append(count)

    @property
    def records(self) -> RecordBatch:
        """All of them."""
        return joined([unpack_records(frame) for frame in self.frames])


@pytest.fixture
def frames() -> Frames:
    return Frames()


@pytest.fixture
def recorder(frames: Frames) -> Iterator[Recorder]:
    """A recorder that gives frames away."""
    made = Recorder(frames.take)
    yield made
    made.close()


def ended(reply: Reply | Exception, *, index: int = 0, **raw: object) -> EndedRequest:
    """A request sent at START, with one part after 10 ns, ended after 100 ns."""
    times = {"send_nanos": START, "end_nanos": START + 100, "parts": [b"part"], "stamps": [START + 10]}
    return EndedRequest(
        request_index=index,
        user_index=3,
        scheduled_nanos=START - 5,
        input_tokens=7,
        generation=Generation(RawReply(**(times | raw)), SaidReplies(reply)),  # type: ignore[arg-type]
    )


GOOD = Reply(chunk_stamps=[START + 20, START + 50], chunk_tokens=[1, 3], token_count_source="server", input_tokens=9)  # noqa: S106 tokens of text


def recorded(recorder: Recorder, frames: Frames, *requests: EndedRequest) -> RecordBatch:
    """The records of some requests, which are valid."""
    for request in requests:
        recorder.add(request)
    recorder.drain()
    records = frames.records
    assert problems(records.since(START - 1000).table(origin="measured")) == []
    return records


def test_a_reply_becomes_a_row(recorder: Any, frames: Any) -> None:
    records = recorded(recorder, frames, ended(GOOD, index=4, stamp_source="kernel"))
    row: dict[str, Any] = {
        name: values[0] for name, values in records.since(START - 5).table(origin="measured").items()
    }
    times, tokens = row.pop("chunk_time_nanos"), row.pop("chunk_token_counts")
    assert times.tolist() == [25, 55]
    assert tokens.tolist() == [1, 3]
    assert row == {
        "request_index": 4,
        "user_index": 3,
        "scheduled_time_nanos": 0,
        "send_time_nanos": 5,
        "first_byte_time_nanos": 15,
        "end_time_nanos": 105,
        "input_token_count": 9,
        "output_token_count": 4,
        "token_count_source": "server",
        "status": "ok",
        "error": "",
        "finish_reason": None,
        "stamp_source": "kernel",
        "origin": "measured",
    }


def test_input_tokens_are_the_given_ones_where_the_server_says_nothing(recorder: Any, frames: Any) -> None:
    silent = Reply(chunk_stamps=[START + 20], chunk_tokens=[1])
    assert recorded(recorder, frames, ended(silent)).input_tokens.tolist() == [7]


BROKEN = Reply(status="disconnected", error="broke off", chunk_stamps=[START + 20], chunk_tokens=[1])
OUT_OF_MEMORY = Reply(status="out_of_memory", error="CUDA out of memory")


@pytest.mark.parametrize(
    ("reply", "failure", "status", "error"),
    [
        (BROKEN, "", "disconnected", "broke off"),
        (BROKEN, "timeout", "timeout", "of the network"),
        (BROKEN, "cancelled", "cancelled", "of the network"),
        (OUT_OF_MEMORY, "", "out_of_memory", "CUDA out of memory"),
        (OUT_OF_MEMORY, "disconnected", "out_of_memory", "CUDA out of memory"),
        (OUT_OF_MEMORY, "timeout", "timeout", "of the network"),
        (Reply(), "", "malformed", "the reply has no tokens"),
        (KeyError("choices"), "", "malformed", "cannot read the reply (KeyError: 'choices')"),
    ],
)
def test_the_status_is_what_the_server_said_or_how_the_connection_ended(
    reply: Any, failure: Any, status: Any, error: Any
) -> None:
    generation = ended(reply, failure=failure, error="of the network" if failure else "").generation
    assert generation.status == status
    assert error in generation.error


def test_tokens_that_came_before_a_failure_are_kept(recorder: Any, frames: Any) -> None:
    records = recorded(recorder, frames, ended(BROKEN, failure="timeout", error="too long"))
    assert records.output_tokens.tolist() == [1]


def test_a_request_that_got_nothing_has_no_first_byte(recorder: Any, frames: Any) -> None:
    nothing = ended(Reply(status="disconnected", error="none"), parts=[], stamps=[], failure="disconnected", error="x")
    records = recorded(recorder, frames, nothing)
    assert records.first_byte_nanos.tolist() == [-1]


def test_times_that_a_clock_put_out_of_order_are_moved_to_the_one_before(recorder: Any, frames: Any) -> None:
    jumped = Reply(chunk_stamps=[START - 50, START + 40, START + 30], chunk_tokens=[1, 1, 1])
    records = recorded(recorder, frames, ended(jumped, stamps=[START - 50], end_nanos=START + 35))
    assert (records.first_byte_nanos - START).tolist() == [0]
    assert (records.chunk_nanos - START).tolist() == [0, 40, 40]
    assert (records.end_nanos - START).tolist() == [40]


def test_replies_of_another_model_are_counted(frames: Any) -> None:
    recorder = Recorder(frames.take, asked_model="mine")
    for model in ("mine", "other", None):
        recorder.add(ended(replace(GOOD, served_model=model)))
    recorder.drain()
    recorder.close()
    assert (recorder.other_model, recorder.other_model_count) == ("other", 1)


def test_rows_leave_in_frames_that_say_how_many_they_have(recorder: Any, frames: Any) -> None:
    for index in range(5):
        recorder.add(ended(GOOD, index=index))
    recorder.drain()
    recorder.flush()
    assert frames.counts == [5]
    assert sorted(frames.records.request_index.tolist()) == list(range(5))


def test_replies_are_parsed_when_the_loop_is_idle_and_only_once(recorder: Any, frames: Any) -> None:
    requests = [ended(GOOD, index=index) for index in range(50)]
    for request in requests:
        recorder.add(request)
    assert recorder.backlog_count == 50  # nothing happens before the loop runs
    with gevent.Timeout(10):
        while recorder.backlog_count:
            gevent.sleep(0.001)
    assert {cast("Any", request.generation._adapter).read_count for request in requests} == {1}
    recorder.flush()
    assert frames.counts == [50]


def test_parsing_waits_for_a_loop_that_has_something_else_to_do(recorder: Any) -> None:
    passes = 0
    due = gevent.get_hub().loop.timer(0, 0.0001)

    def note() -> None:
        nonlocal passes
        passes += 1

    due.start(note)
    recorder.add(ended(GOOD))
    with gevent.Timeout(10):
        while recorder.backlog_count:
            gevent.sleep(0.001)
    assert passes > 0  # the timer ran before the reply was parsed
    due.stop()
    due.close()


class SlowReplies(SaidReplies):
    """An adapter that pauses until it is told to go on."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply)
        self.may_end = False
        self.has_begun = False

    def read(self, received: Received) -> Reply:
        """Pause; without a loop that has time for others there is no pause."""
        self.has_begun = True
        while not self.may_end and received.pause is not go_on:
            received.pause()
        return super().read(received)


@pytest.mark.parametrize("is_drained", [True, False])
def test_a_reply_that_is_parsed_with_pauses_becomes_one_row(recorder: Any, frames: Any, is_drained: Any) -> None:
    request = ended(GOOD)
    adapter = SlowReplies(GOOD)
    request.generation = Generation(request.generation.raw, adapter)
    recorder.add(request)
    with gevent.Timeout(10):
        while not adapter.has_begun:
            gevent.sleep(0.001)
        gevent.sleep(0.001)  # the loop is not held
        assert recorder.backlog_count == 1
        if is_drained:
            recorder.drain()
            assert frames.counts == [1]
        adapter.may_end = True
        while recorder.backlog_count or adapter.read_count < 1 + is_drained:
            gevent.sleep(0.001)
    recorder.drain()
    assert frames.counts == [1]


def test_a_backlog_too_large_is_parsed_at_once(recorder: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(recorder_module, "BACKLOG_BYTES", 100)
    for index in range(10):
        recorder.add(ended(GOOD, index=index, parts=[bytes(40)]))
    assert recorder.backlog_count == 2


def test_replies_that_wait_too_long_are_parsed_by_the_next_flush(recorder: Any, frames: Any) -> None:
    request = ended(GOOD)
    recorder.add(request)
    request.added_seconds = time.monotonic() - 10
    recorder.flush()
    assert frames.counts == [1]


def test_without_a_sink_nothing_is_packed_but_who_asks_hears_of_every_reply() -> None:
    heard: list[EndedRequest] = []
    recorder = Recorder(None, on_parsed=heard.append)
    requests = [ended(GOOD, index=index) for index in range(3)]
    for request in requests:
        recorder.add(request)
    recorder.drain()
    recorder.close()
    assert heard == requests


def test_a_read_with_several_parts_of_a_reply_is_counted_once() -> None:
    counts = [[1, 2, 3], [4, 4, 4, 5, 5], [5, 6], []]  # the second: a read with three, one with two
    stamps = np.array([stamp for reply in counts for stamp in reply], np.int64)
    starts = np.cumsum([0, *map(len, counts)])
    batch = RecordBatch(
        **dict.fromkeys(REQUEST_COLUMNS, np.zeros(len(counts), np.int64)),
        errors=("",) * len(counts),
        chunk_starts=starts,
        chunk_nanos=stamps,
        chunk_tokens=np.ones(len(stamps), np.int64),
    )
    assert coalesced_count(batch) == 2
    assert coalesced_count(batch.take(np.array([0, 2, 3]))) == 0
    assert coalesced_count(batch.take(np.array([3]))) == 0


def test_a_generation_tells_its_times_and_tokens() -> None:
    adapter = SaidReplies(
        Reply(chunk_stamps=[START + 2 * 10**9, START + 5 * 10**9], chunk_tokens=[1, 3], text="Hello you all")
    )
    raw = RawReply(send_nanos=START, end_nanos=START + 6 * 10**9, parts=[b""], stamps=[START])
    generation = Generation(raw, adapter)
    assert adapter.read_count == 0
    assert (generation.ttft_seconds, generation.itl_seconds, generation.end_to_end_seconds) == (2.0, 1.0, 6.0)
    assert (generation.text, generation.output_tokens, generation.status) == ("Hello you all", 4, "ok")
    assert adapter.read_count == 1


def test_the_lag_histogram_is_right_to_an_eighth() -> None:
    rng = np.random.default_rng(3)
    lags = [*rng.lognormal(10, 3, 5000).astype(int).tolist(), 0, 1, 7, 8]
    histogram = LagHistogram()
    for lag in lags:
        histogram.add(lag)
    for share in (0.01, 0.5, 0.9, 0.99):
        truth = int(np.quantile(lags, share, method="inverted_cdf"))
        assert truth <= histogram.quantile_nanos(share) <= max(truth * 9 / 8, truth + 1)
    assert histogram.quantile_nanos(1.0) == histogram.max_nanos == max(lags)
    assert LagHistogram().quantile_nanos(0.99) == 0


def test_codes_of_the_schema_are_kept(recorder: Any, frames: Any) -> None:
    for index, source in enumerate(TOKEN_COUNT_SOURCES):
        reply = Reply(chunk_stamps=[START + 20], chunk_tokens=[1], token_count_source=source)
        recorder.add(ended(reply, index=index))
    recorder.drain()
    by_index = frames.records.take(np.argsort(frames.records.request_index))
    assert by_index.token_count_source.tolist() == [0, 1, 2, 3]
