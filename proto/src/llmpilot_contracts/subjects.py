"""The one table of what NATS carries and keeps: subjects with their payloads and streams, and buckets of objects.

Invariant: every message on a subject of this table is the serialized payload named here and carries its event id as
`Nats-Msg-Id`, so that JetStream drops a repeated publish.
"""

from dataclasses import dataclass
from datetime import timedelta

from google.protobuf.message import Message

from llmpilot.measurement.v1.measurement_pb2 import MeasurementRecorded


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A subject and the protobuf message that travels on it."""

    name: str
    payload: type[Message]
    stream: Stream


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

STREAMS = (MEASUREMENTS,)
SUBJECTS = (MEASUREMENT_RECORDED,)

WORKLOAD_MODELS = Bucket(name="WORKLOAD_MODELS", description="Fitted workload models, by their id: model files.")

BUCKETS = (WORKLOAD_MODELS,)
