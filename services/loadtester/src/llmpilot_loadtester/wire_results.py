"""Between protobuf and domain: stages and what they measured.

Invariant: `read_result(write_result(result)) == result`.
"""

import msgspec
from google.protobuf.timestamp_pb2 import Timestamp

from llmpilot.loadtest.v1 import loadtest_pb2 as pb
from llmpilot_loadtester.domain.results import StageMetrics, StageResult, Verdict
from llmpilot_loadtester.wire_spec import read_service_level, read_stage, write_service_level, write_stage


def write_result(result: StageResult) -> pb.StageResult:
    """Return what a stage measured for the wire."""
    start_time = Timestamp()
    start_time.FromNanoseconds(result.start_unix_nanos)
    return pb.StageResult(
        stage_index=result.stage_index,
        attempt=result.attempt,
        stage=write_stage(result.stage),
        start_time=start_time,
        metrics_json=msgspec.json.encode(result.metrics).decode(),
        verdict=pb.Verdict(
            is_valid=result.verdict.is_valid, reasons=result.verdict.reasons, notes=result.verdict.notes
        ),
        service_level=write_service_level(result.service_level),
    )


def read_result(wire: pb.StageResult) -> StageResult:
    """Return what a stage measured."""
    return StageResult(
        stage_index=wire.stage_index,
        attempt=wire.attempt,
        stage=read_stage(wire.stage),
        start_unix_nanos=wire.start_time.ToNanoseconds(),
        metrics=msgspec.json.decode(wire.metrics_json, type=StageMetrics),
        verdict=Verdict(
            is_valid=wire.verdict.is_valid, reasons=tuple(wire.verdict.reasons), notes=tuple(wire.verdict.notes)
        ),
        service_level=read_service_level(wire.service_level),
    )
