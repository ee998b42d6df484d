"""Where load tests are kept: the snapshots and the logs of all of them, in JetStream streams."""

from dataclasses import replace

from llmpilot_contracts.subjects import LOAD_TEST_EVENT, LOAD_TEST_STATE
from llmpilot_loadtester.domain.load_test import LoadTest
from llmpilot_loadtester.wire_events import is_end, read_snapshot, write_snapshot
from llmpilot_servicekit.jobs.job_states import JobStates
from llmpilot_servicekit.jobs.job_wire import JobWire
from llmpilot_servicekit.nats_connection import NatsConnection


def _in_list(load_test: LoadTest) -> LoadTest:
    return replace(load_test, results=())


LOAD_TEST_WIRE = JobWire(
    state=LOAD_TEST_STATE,
    event=LOAD_TEST_EVENT,
    write_snapshot=write_snapshot,
    read_snapshot=read_snapshot,
    in_list=_in_list,
    is_end=is_end,
    find_hint="ListLoadTests names all",
)
LoadTestStates = JobStates[LoadTest]


def load_test_states(nats: NatsConnection) -> LoadTestStates:
    """Return the snapshots of all load tests."""
    return JobStates(nats, LoadTest, LOAD_TEST_WIRE)
