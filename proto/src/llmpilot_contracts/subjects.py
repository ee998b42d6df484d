"""The one table of what NATS carries and keeps: subjects with their payloads and streams, and buckets of objects.

Invariant: every message on a subject of this table is the serialized payload named here and carries its event id as
`Nats-Msg-Id`, so that JetStream drops a repeated publish.
"""

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Self

from google.protobuf.message import Message

from llmpilot.loadtest.v1.loadtest_pb2 import LoadTestEvent, LoadTestSnapshot
from llmpilot.measurement.v1.measurement_pb2 import MeasurementRecorded
from llmpilot.tuning.v1.tuning_pb2 import TuningCompleted, TuningEvent, TuningSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A JetStream stream."""

    name: str
    subjects: tuple[str, ...]
    max_age: timedelta | None
    """How long a message is kept; None: for ever."""
    duplicate_window: timedelta
    """How long a repeated `Nats-Msg-Id` is recognized."""
    description: str
    latest_only: bool = False
    """Whether a message replaces the one before of the same subject."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A subject and the protobuf message that travels on it."""

    name: str
    """With "*" in the place of an id where there is a subject per resource: to be followed, not published to."""
    payload: type[Message]
    stream: Stream

    def of(self, resource_id: str) -> Self:
        """Return the subject of one resource; its id has no dot, space or wildcard."""
        return replace(self, name=self.name.replace("*", resource_id))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A JetStream object store: named files that outlive the service that wrote them, and that its replicas share."""

    name: str
    description: str


MEASUREMENTS = Stream(
    name="MEASUREMENTS",
    subjects=("llmpilot.measurement.v1.>",),
    max_age=None,
    duplicate_window=timedelta(minutes=10),
    description="Every measurement ever made: the system of record of the dataset.",
)

MEASUREMENT_RECORDED = Subject(
    name="llmpilot.measurement.v1.recorded", payload=MeasurementRecorded, stream=MEASUREMENTS
)

LOAD_TESTS = Stream(
    name="LOAD_TESTS",
    subjects=("llmpilot.loadtest.v1.*.state",),
    max_age=None,
    duplicate_window=timedelta(minutes=10),
    description="Where every load test is in its life.",
    latest_only=True,
)

LOAD_TEST_EVENTS = Stream(
    name="LOAD_TEST_EVENTS",
    subjects=("llmpilot.loadtest.v1.*.event",),
    max_age=timedelta(days=30),
    duplicate_window=timedelta(minutes=10),
    description="What happened in every load test, with the records of its requests.",
)

LOAD_TEST_STATE = Subject(name="llmpilot.loadtest.v1.*.state", payload=LoadTestSnapshot, stream=LOAD_TESTS)
LOAD_TEST_EVENT = Subject(name="llmpilot.loadtest.v1.*.event", payload=LoadTestEvent, stream=LOAD_TEST_EVENTS)

TUNINGS = Stream(
    name="TUNINGS",
    subjects=("llmpilot.tuning.v1.*.state",),
    max_age=None,
    duplicate_window=timedelta(minutes=10),
    description="Where every tuning is in its life.",
    latest_only=True,
)

TUNING_EVENTS = Stream(
    name="TUNING_EVENTS",
    subjects=("llmpilot.tuning.v1.*.event",),
    max_age=timedelta(days=30),
    duplicate_window=timedelta(minutes=10),
    description="What happened in every tuning.",
)

TUNING_RESULTS = Stream(
    name="TUNING_RESULTS",
    subjects=("llmpilot.tuning.v1.completed",),
    max_age=None,
    duplicate_window=timedelta(minutes=10),
    description="Every maximum batch weight that was found.",
)

TUNING_STATE = Subject(name="llmpilot.tuning.v1.*.state", payload=TuningSnapshot, stream=TUNINGS)
TUNING_EVENT = Subject(name="llmpilot.tuning.v1.*.event", payload=TuningEvent, stream=TUNING_EVENTS)
TUNING_COMPLETED = Subject(name="llmpilot.tuning.v1.completed", payload=TuningCompleted, stream=TUNING_RESULTS)

STREAMS = (MEASUREMENTS, LOAD_TESTS, LOAD_TEST_EVENTS, TUNINGS, TUNING_EVENTS, TUNING_RESULTS)
SUBJECTS = (
    MEASUREMENT_RECORDED,
    LOAD_TEST_STATE,
    LOAD_TEST_EVENT,
    TUNING_STATE,
    TUNING_EVENT,
    TUNING_COMPLETED,
)

WORKLOAD_MODELS = Bucket(name="WORKLOAD_MODELS", description="Fitted workload models, by their id: model files.")

LOAD_TEST_SPECS = Bucket(
    name="LOAD_TEST_SPECS",
    description="What load tests that have not ended do, by their id: LoadTestSpec, with keys and prompts.",
)

TUNING_SPECS = Bucket(name="TUNING_SPECS", description="What tunings that have not ended do, by their id: TuningSpec.")

TUNING_CACHE = Bucket(
    name="TUNING_CACHE",
    description="Maximum batch weights found, by the digest of all they depend on: reports, as JSON.",
)

BUCKETS = (WORKLOAD_MODELS, LOAD_TEST_SPECS, TUNING_SPECS, TUNING_CACHE)
