"""Where a service keeps its jobs, and how it writes them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from google.protobuf.message import Message

from llmpilot_contracts.job import Job
from llmpilot_contracts.subjects import Subject

J = TypeVar("J", bound=Job)
E_contra = TypeVar("E_contra", contravariant=True)


class WriteEvent(Protocol[E_contra]):
    """Makes the message of an event; it has the fields `index` and `event_time`."""

    def __call__(self, event: E_contra, *, index: int, unix_nanos: int) -> Message:
        """Return the message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobWire(Generic[J]):
    """The subjects of one kind of job, and what is on them."""

    state: Subject
    event: Subject
    write_snapshot: Callable[[J], Message]
    read_snapshot: Callable[[Message], J]
    in_list: Callable[[J], J]
    """Leaves out what a list of jobs has no room for."""
    is_end: Callable[[Message], bool]
    """Whether an event is the last of its job."""
    find_hint: str
    """For who asks for a job that there is not, e.g. "ListLoadTests names all"."""


def index_of(event: Message) -> int:
    """Return the position of an event in its log."""
    message: Any = event
    return int(message.index)
