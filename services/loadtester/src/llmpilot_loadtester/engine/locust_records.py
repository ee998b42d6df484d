"""Records of a run that Locust itself drives: `--llm-records FILE`, from one process or from workers on many machines.

Invariant: the file has every request of every process once, exactly as it was recorded; nothing is averaged on the way.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from locust import events
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import Runner, WorkerRunner

from llmpilot_loadtester.domain.record_frames import unpack_records
from llmpilot_loadtester.domain.records import RecordBatch, joined
from llmpilot_loadtester.domain.results import Verdict
from llmpilot_loadtester.domain.spec import Load, LoadKind, Stage, UserStep

_MESSAGE = "llm-records"
_NOTE = "run by Locust: the load tester did not judge whether its own process kept up"


def _add_option(parser: LocustArgumentParser) -> None:
    parser.add_argument(
        "--llm-records",
        metavar="FILE",
        default="",
        help="Parquet file for the records of all requests, with the arrival of every token",
    )


events.init_command_line_parser.add_listener(_add_option)  # type: ignore[no-untyped-call]


def sink_of(environment: Environment) -> Callable[[bytes, int], None] | None:
    """Return what takes frames of records to where they are collected; None: nobody wants them."""
    runner = environment.runner
    if runner is None or not getattr(environment.parsed_options, "llm_records", ""):
        return None
    return lambda frame, _: runner.send_message(_MESSAGE, frame)


def collect_records(environment: Environment, runner: Runner) -> None:
    """Write the file when a test stops; does nothing in a worker of distributed Locust."""
    if isinstance(runner, WorkerRunner):
        return
    collector = _Collector()
    runner.register_message(_MESSAGE, collector.take)

    def write(**_: object) -> None:
        path = getattr(environment.parsed_options, "llm_records", "")
        if path and collector.has_news:
            collector.write(Path(path), environment)

    environment.events.test_start.add_listener(collector.begin)  # type: ignore[no-untyped-call]
    environment.events.test_stop.add_listener(write)  # type: ignore[no-untyped-call]
    # A master that quits says that the test has stopped before its workers give it their last records.
    environment.events.quit.add_listener(write)  # type: ignore[no-untyped-call]


class _Collector:
    """Keeps frames by process, packed as they came."""

    def __init__(self) -> None:
        self.has_news = False
        """Whether anything happened since the file was written."""
        self._frames: dict[str, list[bytes]] = {}

    def begin(self, **_: object) -> None:
        """Forget the records of the test before."""
        self._frames.clear()
        self.has_news = True

    def take(self, msg: Any, **_: object) -> None:
        """Keep a frame."""
        self._frames.setdefault(msg.node_id, []).append(msg.data)
        self.has_news = True

    def write(self, path: Path, environment: Environment) -> None:
        """Write the records there are; raises PreconditionError."""
        # pyarrow is big, and most runs do not want it.
        from llmpilot_loadtester.outputs.records_file import write_records  # noqa: PLC0415
        from llmpilot_loadtester.outputs.run_facts import RunFacts, StageFacts, public_url  # noqa: PLC0415

        records = merged([list(map(unpack_records, frames)) for _, frames in sorted(self._frames.items())])
        start_nanos = int(records.scheduled_nanos.min()) if len(records) else time.time_ns()
        seconds = (int(records.end_nanos.max()) - start_nanos) / 1e9 if len(records) else 0.0
        users_count = environment.runner.target_user_count if environment.runner else 0
        load = Load(kind=LoadKind.USERS, user_steps=(UserStep(at_seconds=0.0, users_count=users_count),))
        stage = Stage(load=load, warm_up_seconds=0.0, measure_seconds=seconds)
        verdict = Verdict(is_valid=True, notes=(_NOTE,))
        facts = RunFacts(
            target_url=public_url(environment.host or ""),
            requests="those of a locustfile",
            created_unix_nanos=start_nanos,
            notes=(_NOTE,),
        )
        stage_facts = StageFacts(stage_index=0, stage=stage, start_unix_nanos=start_nanos, verdict=verdict)
        self.has_news = False
        write_records(path, facts, [(stage_facts, records.since(start_nanos))])


def merged(batches_by_process: list[list[RecordBatch]]) -> RecordBatch:
    """Return all records in the order of sending. Users are numbered on from process to process, requests anew."""
    numbered = []
    first_user = 0
    for batches in batches_by_process:
        records = joined(batches)
        numbered.append(replace(records, user_index=records.user_index + first_user))
        first_user += int(records.user_index.max()) + 1 if len(records) else 0
    records = joined(numbered)
    return replace(records, request_index=np.arange(len(records), dtype=np.int64))
