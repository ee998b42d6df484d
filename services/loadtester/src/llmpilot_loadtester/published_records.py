"""The published raw records (IBM/LLM-performance-prediction; Lazuka et al., 2024) in the schema of our own.

What each raw row tells: when the client called (`start_timestamp`), when each message of the server came
(`timestamps_per_token`), all in whole milliseconds of one clock. The first message is the input token count, not a
token. The published TTFT counts from it, so it is the send time here, and the call is the scheduled time: figures "from
schedule" are what the client saw. What cannot be known, and is left empty: who of the users sent a request, why a reply
ended, the time below a millisecond. Where there are fewer messages than tokens (TGIS drops empty texts) the missing
ones are counted to the first message, so that all gaps are as published.
Invariant: requests, statuses, token counts and times are those of the files; nothing is drawn or filled in.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

import numpy as np

from llmpilot_contracts.errors import InvalidInputError, NotFoundError, Violation
from llmpilot_contracts.record_schema import OK, STAMP_SOURCES, STATUSES, TOKEN_COUNT_SOURCES
from llmpilot_loadtester.domain.records import UNKNOWN, Integers, RecordBatch
from llmpilot_loadtester.domain.results import Verdict
from llmpilot_loadtester.domain.spec import Load, LoadKind, Stage, UserStep
from llmpilot_loadtester.outputs.records_file import RecordsWriter, records_writer
from llmpilot_loadtester.outputs.run_facts import RunFacts, StageFacts

PROTOCOL = "tgis"
NANOS_PER_MS = 1_000_000
SOURCE = "IBM/LLM-performance-prediction (Lazuka et al., 2024), CDLA-Permissive-2.0"
NOTES = (
    f"Imported from {SOURCE}; times are whole milliseconds, stamped by the client in user space.",
    "TTFT counts from the server's first message, as published; figures from schedule count from the client's call.",
)
GPU_PROFILES = {"A10": "A10-24GB", "A100": "A100-40GB", "H100": "H100-80GB", "T4": "T4-16GB", "V100": "V100-16GB"}
"""Names of the catalogue by those of the files."""
_FILE_NAME = re.compile(r"results_(?P<llm>.+)_gpu(?P<gpu_count>\d+)_(?P<gpu_type>[^_]+)_u(?P<users_count>\d+)\.csv")
_COLUMNS = (
    "reqnum",
    "errors",
    "status",
    "start_timestamp",
    "end_timestamp",
    "experiment_duration_s",
    "n_input_tokens",
    "n_output_tokens",
    "timestamps_per_token",
)
_SUCCEEDED = 200.0
_READ_BYTES = 1 << 18
_OPENERS: dict[bytes, Callable[[Path, str], object]] = {
    b"\xfd7zXZ": lzma.open,
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Which load test a raw file is of."""

    llm: str
    gpu_profile: str
    users_count: int

    @property
    def ladder(self) -> str:
        """The part of a file name that the load tests of one LLM on one GPU profile share."""
        return f"{self.llm.replace('/', '__')}_{self.gpu_profile}"


def case_of(name: str) -> Case | None:
    """Return the case that a file's name tells; None: it is no raw file."""
    match = _FILE_NAME.fullmatch(PurePosixPath(name).name)
    if match is None or match["gpu_type"].upper() not in GPU_PROFILES:
        return None
    return Case(
        llm=match["llm"].replace("__", "/"),
        gpu_profile=f"{match['gpu_count']}x{GPU_PROFILES[match['gpu_type'].upper()]}",
        users_count=int(match["users_count"]),
    )


def raw_files(path: Path, is_wanted: Callable[[Case], bool]) -> Iterator[tuple[Case, str, bytes]]:
    """Yield the wanted raw files of a folder, at any depth, or of a tar archive: case, name, content.

    A folder without raw files may have archives of them. Raises NotFoundError, and InvalidInputError for an archive
    that is no archive or not whole.
    """
    if path.is_dir():
        files = [(case, file) for file in sorted(path.rglob("*.csv")) if (case := case_of(file.name)) is not None]
        for case, file in files:
            if is_wanted(case):
                yield case, str(file.relative_to(path)), file.read_bytes()
        if not files:
            for archive in sorted({*path.glob("*.tar"), *path.glob("*.tar.*")}):
                yield from raw_files(archive, is_wanted)
        return
    if not path.exists():
        raise NotFoundError("raw data", str(path), hint="give a folder of CSV files or a tar archive")
    try:
        with _opened(path) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as members:
                for member in members:
                    case = case_of(member.name) if member.isreg() else None
                    content = members.extractfile(member) if case is not None and is_wanted(case) else None
                    if case is not None and content is not None:
                        yield case, member.name, content.read()
            while stream.read(_READ_BYTES):  # to the end, where a compressed file that was cut off shows
                pass
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise InvalidInputError(
            [Violation(str(path), f"must be a complete tar archive or a folder: {error}; fetch it again")]
        ) from error


def _opened(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        magic = file.read(6)
    opener = next((opener for prefix, opener in _OPENERS.items() if magic.startswith(prefix)), open)
    return cast("BinaryIO", opener(path, "rb"))


@dataclass(frozen=True, slots=True)
class _Row:
    index: int
    called_ms: int
    stamps_ms: list[int]
    ended_ms: int
    input_tokens: int
    output_tokens: int
    status: str
    error: str


def read_case(case: Case, name: str, content: bytes) -> tuple[StageFacts, RecordBatch]:
    """Return the records of one raw file, times since its first call; raises InvalidInputError for every bad row."""
    reader = csv.DictReader(io.StringIO(content.decode(errors="replace")))
    missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise InvalidInputError(Violation(f"{name} column {column}", "is missing") for column in missing)
    rows, durations, violations = [], set(), []
    for number, cells in enumerate(reader, start=1):
        try:
            rows.append(_row(cells))
            durations.add(float(cells["experiment_duration_s"]))
        except (ValueError, TypeError, IndexError) as error:
            violations.append(Violation(f"{name} row {number}", f"cannot be read: {error}"))
    if not rows and not violations:
        violations.append(Violation(name, "has no rows"))
    if len(durations) > 1:
        violations.append(Violation(f"{name} column experiment_duration_s", "must be the same in every row"))
    if violations:
        raise InvalidInputError(violations)
    start_ms = min(row.called_ms for row in rows)
    records = _batch(rows, start_ms)
    last_send_nanos = int(records.send_nanos.max())
    facts = StageFacts(
        stage_index=max(0, case.users_count.bit_length() - 1),
        stage=_stage(case.users_count, max(durations.pop(), (last_send_nanos + NANOS_PER_MS) / 1e9)),
        start_unix_nanos=start_ms * NANOS_PER_MS,
        verdict=Verdict(is_valid=True, notes=("published; the load tester's own health is not known",)),
        llm=case.llm,
        gpu_profile=case.gpu_profile,
    )
    return facts, records


def _stage(users_count: int, measure_seconds: float) -> Stage:
    """Return the stage; its window is the test, or longer by what a last request's first message came later: 173 ms."""
    steps = (UserStep(at_seconds=0.0, users_count=users_count),)
    return Stage(load=Load(kind=LoadKind.USERS, user_steps=steps), warm_up_seconds=0.0, measure_seconds=measure_seconds)


def _row(cells: dict[str, str]) -> _Row:
    is_ok = float(cells["status"]) == _SUCCEEDED
    called = int(float(cells["start_timestamp"]))
    stamps = [int(stamp) for stamp in json.loads(cells["timestamps_per_token"])]
    ended = int(float(cells["end_timestamp"])) if cells["end_timestamp"] else max([called, *stamps[-1:]])
    token_messages = max(0, len(stamps) - 1)
    output = int(float(cells["n_output_tokens"])) if is_ok else token_messages
    if is_ok and not 0 < token_messages <= output:
        raise ValueError(f"{token_messages} messages with tokens cannot hold {output} tokens")
    status, error = (OK, "") if is_ok else _failure(cells)
    return _Row(
        index=int(cells["reqnum"]),
        called_ms=called,
        stamps_ms=stamps,
        ended_ms=max([ended, *stamps[-1:]]),
        input_tokens=int(float(cells["n_input_tokens"])) if cells["n_input_tokens"] else UNKNOWN,
        output_tokens=output,
        status=status,
        error=error,
    )


def _failure(cells: dict[str, str]) -> tuple[str, str]:
    """Say what a failed row's text tells; one without a text and an end was under way when the test ended."""
    text = cells["errors"]
    if "OutOfMemory" in text or "CUDA out of memory" in text:
        return "out_of_memory", text
    if "deadline exceeded" in text:
        return "timeout", text
    if text not in {"", "[]"}:
        return "server_error", text
    if not cells["end_timestamp"]:
        return "cancelled", f"status {float(cells['status']):g}, no end and no text: under way when the test ended"
    return "disconnected", f"status {float(cells['status']):g} and no text"


def _batch(rows: Sequence[_Row], start_ms: int) -> RecordBatch:
    counts = np.array([max(0, len(row.stamps_ms) - 1) for row in rows], np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    stamps = [stamp for row in rows for stamp in row.stamps_ms[1:]]
    chunk_tokens = np.ones(len(stamps), np.int64)
    has_chunks = counts > 0
    missing = np.array([row.output_tokens for row in rows], np.int64) - counts
    chunk_tokens[starts[:-1][has_chunks]] += missing[has_chunks]
    first_message = [row.stamps_ms[0] if row.stamps_ms else None for row in rows]
    sent = [row.called_ms if message is None else message for row, message in zip(rows, first_message, strict=True)]
    everyone = np.zeros(len(rows), np.int64)
    is_ok = np.array([row.status == OK for row in rows])
    return RecordBatch(
        request_index=np.array([row.index for row in rows], np.int64),
        user_index=everyone + UNKNOWN,
        scheduled_nanos=_nanos([row.called_ms for row in rows], start_ms),
        send_nanos=_nanos(sent, start_ms),
        first_byte_nanos=np.where(
            [message is not None for message in first_message], _nanos(sent, start_ms), UNKNOWN
        ).astype(np.int64),
        end_nanos=_nanos([row.ended_ms for row in rows], start_ms),
        input_tokens=np.array([row.input_tokens for row in rows], np.int64),
        reasoning_tokens=everyone + UNKNOWN,
        token_count_source=np.where(
            is_ok, TOKEN_COUNT_SOURCES.index("server"), TOKEN_COUNT_SOURCES.index("chunks")
        ).astype(np.int64),
        status=np.array([STATUSES.index(row.status) for row in rows], np.int64),
        finish_reason=everyone + UNKNOWN,
        stamp_source=everyone + STAMP_SOURCES.index("user_space"),
        errors=tuple(row.error for row in rows),
        chunk_starts=starts,
        chunk_nanos=_nanos(stamps, start_ms),
        chunk_tokens=chunk_tokens,
    )


def _nanos(milliseconds: Sequence[int], start_ms: int) -> Integers:
    return (np.array(milliseconds, np.int64) - start_ms) * NANOS_PER_MS


def import_records(path: Path, folder: Path, is_wanted: Callable[[Case], bool], facts: RunFacts) -> Iterator[Path]:
    """Write a records file per LLM and GPU profile, a stage per number of users; yields each raw file's place at once.

    Streams: one load test is in memory at a time. The files are put in place at the end, whole.
    """
    with ExitStack() as stack:
        writers: dict[str, RecordsWriter] = {}
        for case, name, content in raw_files(path, is_wanted):
            stage, records = read_case(case, name, content)
            target = folder / f"{case.ladder}.parquet"
            if case.ladder not in writers:
                writers[case.ladder] = stack.enter_context(records_writer(target))
            writers[case.ladder].add(stage, records)
            yield target
        for ladder, writer in writers.items():
            writer.close(replace(facts, served_model=ladder.rpartition("_")[0].replace("__", "/")))
