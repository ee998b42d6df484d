"""Where tunings are kept: the snapshots and the logs of all of them, in JetStream streams."""

from llmpilot_contracts.subjects import TUNING_EVENT, TUNING_STATE
from llmpilot_servicekit.jobs.job_states import JobStates
from llmpilot_servicekit.jobs.job_wire import JobWire
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_tuner.domain.tuning import Tuning
from llmpilot_tuner.wire import in_list
from llmpilot_tuner.wire_events import is_end, read_snapshot, write_snapshot

TUNING_WIRE = JobWire(
    state=TUNING_STATE,
    event=TUNING_EVENT,
    write_snapshot=write_snapshot,
    read_snapshot=read_snapshot,
    in_list=in_list,
    is_end=is_end,
    find_hint="ListTunings names all",
)
TuningStates = JobStates[Tuning]


def tuning_states(nats: NatsConnection) -> TuningStates:
    """Return the snapshots of all tunings."""
    return JobStates(nats, Tuning, TUNING_WIRE)
