"""A load test as seen by who watches its events: how it goes, what it measured, every record.

Invariant: it holds what the events said, in whatever parts they came; records stay packed, on disk, until they are
asked for.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from llmpilot_loadtester.domain.events import LiveMetrics, Noted, RecordsCame, StageBegan, StageMeasured, TargetFound
from llmpilot_loadtester.domain.load_test import Changed, LoadTest, LogEvent
from llmpilot_loadtester.domain.record_frames import unpack_records
from llmpilot_loadtester.domain.records import RecordBatch, joined
from llmpilot_loadtester.domain.results import StageResult, Verdict
from llmpilot_loadtester.frame_file import FrameFile
from llmpilot_loadtester.outputs.run_facts import StageFacts

_INTERRUPTED = Verdict(is_valid=False, reasons=("the stage was interrupted before it had been measured",))


@dataclass(slots=True)
class WatchedRun:
    """What is known so far."""

    load_test: LoadTest | None = None
    live: LiveMetrics | None = None
    """Of the stage that runs."""
    running: StageBegan | None = None
    results: dict[int, StageResult] = field(default_factory=dict)
    """By stage; the last attempt counts."""
    notes: list[str] = field(default_factory=list)
    _begun: dict[tuple[int, int], StageBegan] = field(default_factory=dict)
    _frames: defaultdict[tuple[int, int], FrameFile] = field(default_factory=lambda: defaultdict(FrameFile))

    def take(self, event: LogEvent) -> None:
        """Take the next event."""
        match event:
            case Changed(load_test=load_test):
                self.load_test = load_test
            case StageBegan():
                self.running, self.live = event, None
                self._begun[event.stage_index, event.attempt] = event
            case RecordsCame():
                self._frames[event.stage_index, event.attempt].append(event.columns)
            case LiveMetrics():
                self.live = event
            case StageMeasured(result=result):
                self.results[result.stage_index] = result
                self.running = self.live = None
            case Noted(text=text):
                self.notes.append(text)
            case TargetFound():
                pass  # the load test says it, too

    @property
    def ordered_results(self) -> tuple[StageResult, ...]:
        """What was measured, by stage."""
        return tuple(self.results[index] for index in sorted(self.results))

    def stages(self, *, llm: str, gpu_profile: str) -> Iterator[tuple[StageFacts, RecordBatch]]:
        """Yield every run of every stage with its records, whose times are since its start."""
        for (stage_index, attempt), begun in sorted(self._begun.items()):
            result = self.results.get(stage_index)
            is_measured = result is not None and result.attempt == attempt
            facts = StageFacts(
                stage_index=stage_index,
                stage=begun.stage,
                start_unix_nanos=begun.start_unix_nanos,
                verdict=result.verdict if result is not None and is_measured else _INTERRUPTED,
                attempt=attempt,
                llm=llm,
                gpu_profile=gpu_profile,
            )
            frames = self._frames[stage_index, attempt]
            yield facts, joined([unpack_records(frame) for frame in frames]).since(begun.start_unix_nanos)
