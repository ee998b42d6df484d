"""What requests for jobs have in common: names, ids, pages. Reading one collects every violation before it refuses."""

import hashlib
import re
from collections.abc import Iterator
from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_contracts.job import Job

LARGEST_PAGE_SIZE = 1000
LARGEST_REQUEST_ID = 128
JOB_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SHOWN = 80
"""Characters of a wrong text in a message."""


def id_violations(request_id: str, job_id: str, *, id_field: str) -> Iterator[Violation]:
    """Yield what is wrong with the ids of a request that creates a job; job_id may be empty."""
    if not 1 <= len(request_id) <= LARGEST_REQUEST_ID:
        yield Violation("request_id", f"must have 1 to {LARGEST_REQUEST_ID} characters, has {len(request_id)}")
    if job_id and not JOB_ID.fullmatch(job_id):
        description = 'must be 1 to 63 lower-case letters, digits and "-", not "-" at either end, is '
        yield Violation(id_field, f"{description}{_shown(job_id)}")


def id_of_request(prefix: str, request_id: str) -> str:
    """Return the id of the job that a request makes which chooses none: the same for the same request."""
    return f"{prefix}-{hashlib.sha256(request_id.encode()).hexdigest()[:16]}"


def read_name(kind: type[Job], name: str, *, example: str) -> str:
    """Return the id in a job's resource name; raises InvalidInputError."""
    job_id = name.removeprefix(kind.collection)
    if not name.startswith(kind.collection) or not JOB_ID.fullmatch(job_id):
        raise InvalidInputError([Violation("name", f'must be like "{kind.collection}{example}", is {_shown(name)}')])
    return job_id


def read_page(page_size: int, page_token: str, *, default_size: int) -> tuple[str, int]:
    """Return after which id a page begins and how many jobs it has at most; the token is the last id before."""
    violations = []
    if not 0 <= page_size <= LARGEST_PAGE_SIZE:
        violations.append(Violation("page_size", f"must be between 0 and {LARGEST_PAGE_SIZE}, is {page_size}"))
    if page_token and not JOB_ID.fullmatch(page_token):
        violations.append(Violation("page_token", f"{_shown(page_token)} is not the next_page_token of a page"))
    if violations:
        raise InvalidInputError(violations)
    return page_token, page_size or default_size


def read_watch(kind: type[Job], name: str, start_index: int, *, example: str) -> tuple[str, int]:
    """Return the id of a job and the index of the first event that is wanted; raises InvalidInputError."""
    violations = []
    if start_index < 0:
        violations.append(Violation("start_index", f"must be >= 0, is {start_index}"))
    try:
        job_id = read_name(kind, name, example=example)
    except InvalidInputError as error:
        violations += error.violations
    if violations:
        raise InvalidInputError(violations)
    return job_id, start_index


def write_time(time: datetime | None) -> Timestamp | None:
    """Return a time for the wire; None: absent."""
    if time is None:
        return None
    written = Timestamp()
    written.FromDatetime(time)
    return written


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
