"""Runs the corner cases of weights on one server after the other, and keeps what came of them.

Invariant: a probe is kept whole: its cases up to the first that ran out of memory, in the order of what they need.
"""

from collections.abc import Callable, Sequence

from llmpilot_perfmodel.step_memory.batch import Batch
from llmpilot_tuner.domain.corners import sweep_batches
from llmpilot_tuner.domain.events import CaseRan, Note, ProbeEnded, ProbeStarted, RunEvent, SoakStarted
from llmpilot_tuner.domain.limits import Limits
from llmpilot_tuner.domain.probing import CaseRun, Outcome, Probe, ProbeFacts, ProbeKind
from llmpilot_tuner.domain.result import Soak
from llmpilot_tuner.domain.search import Problem, Search
from llmpilot_tuner.domain.servers import Server
from llmpilot_tuner.domain.spec import TuningSpec
from llmpilot_tuner.server_probe.server_log import missing_bytes
from llmpilot_tuner.server_probe.session import Session

_MOST_SEARCH_PROBES = 10
"""Of a server that has run out of memory and lives on."""
_BADLY_REACHED = 0.9
_NOT_MEASURED = "a server does not say how much memory a request took: headroom is by prediction"
_TGI_PREFILLS = "TGI may read requests that arrive together in several prefills, smaller than the corner's"
_TGI_LOGPROBS = "TGI streams no log-probabilities of inputs: those cases ran without"
Emit = Callable[[RunEvent], None]


def prober_facts(spec: TuningSpec, limits: Limits, server: Session, *, weight_bytes: int) -> ProbeFacts:
    """Return what a server says of itself, and what a tuning with it cannot do; weight_bytes: by the formulas."""
    facts = server.facts
    notes = [_NOT_MEASURED]
    if spec.server is Server.TGI:
        notes += [_TGI_PREFILLS, *([_TGI_LOGPROBS] if limits.prompt_logprobs else [])]
    said = ((facts.name, facts.version), ("model", facts.model))
    return ProbeFacts(
        kind=ProbeKind.SERVER,
        device=spec.gpu_name or "the server's own",
        capacity_bytes=spec.capacity_bytes,
        weight_bytes=server.log_facts.weight_bytes or weight_bytes,
        versions=tuple((name, text) for name, text in said if text),
        notes=tuple(notes),
    )


class ServerProbes:
    """What was probed, in order."""

    def __init__(self, problem: Problem, limits: Limits, *, soak_steps: int, emit: Emit) -> None:
        self.probes: list[Probe] = []
        self.soak: Soak | None = None
        """Of the last weight that passed as the final one."""
        self.lowered_from: list[int] = []
        """Weights that were to be final and were not."""
        self.notes: list[str] = []
        self._held: dict[int, int] = {}
        self._problem = problem
        self._limits = limits
        self._soak_steps = soak_steps
        self._emit = emit

    def note(self, text: str) -> None:
        """Keep a line, and say it."""
        self.notes.append(text)
        self._emit(Note(text=text))

    async def probe(self, server: Session, weight: int, why: str, *, is_final: bool) -> bool:
        """Run the cases of a weight; is_final: and of all request counts between the corners, if it may be the last."""
        cases = Search(self._problem).ordered_cases(weight)
        between = sweep_batches(self._limits, weight)[: self._soak_steps] if is_final else ()
        self._emit(ProbeStarted(weight=weight, case_count=len(cases), why=why))
        runs = await self._run_cases(server, weight, cases)
        if between and all(run.outcome is Outcome.PASSED for run in runs):
            self._emit(SoakStarted(weight=weight, step_count=len(between)))
            runs += await self._run_cases(server, weight, between)
            self.soak = Soak(
                step_count=len(between),
                largest_peak_bytes=None,
                largest_reserved_bytes=None,
                growth_bytes=0,
                drift_bytes=0,
                lowered_from=tuple(self.lowered_from),
            )
        probe = Probe(weight=weight, runs=tuple(runs))
        self.probes.append(probe)
        self._emit(ProbeEnded(probe=probe))
        if probe.passed:
            self._held[weight] = max(server.runner.most_held, self._held.get(weight, 0))
        if probe.passed and is_final:
            self._note_reach(server, weight)
        server.runner.forget()
        return probe.passed

    def most_held(self, weight: int) -> int:
        """Return the tokens that decode steps had at once when a weight passed; 0: nobody saw."""
        return self._held.get(weight, 0)

    async def _run_cases(self, server: Session, weight: int, batches: Sequence[Batch]) -> list[CaseRun]:
        runs: list[CaseRun] = []
        for batch in batches:
            runs.append(await server.runner.run(batch))
            self._emit(CaseRan(weight=weight, run=runs[-1]))
            if runs[-1].outcome is Outcome.OUT_OF_MEMORY:
                break
        return runs

    def _note_reach(self, server: Session, weight: int) -> None:
        runner = server.runner
        for case, share in sorted(runner.reached.items()):
            if share < _BADLY_REACHED:
                self.note(f"case {case} of weight {weight:,} was reached to {share:.0%}: no more was there at once")
        if runner.early_count:
            self.note(f"{runner.early_count} replies ended by themselves before their length")

    async def search_on(self, server: Session, failed: int) -> int | None:
        """Search below a weight on a server that is still alive; returns the largest that passed, None: none did."""
        search = Search(self._problem, [probe for probe in self.probes if probe.weight <= failed])
        for _ in range(_MOST_SEARCH_PROBES):
            wanted = search.next()
            if wanted is None or not await server.is_alive():
                break
            await self.probe(server, wanted.weight, f"{wanted.why}, same start", is_final=False)
            search.record(self.probes[-1])
        return search.passed

    def missing_bytes(self, server: Session) -> int | None:
        """Return what the allocation that failed last lacked; None: nobody says."""
        said = [run.message for run in self.probes[-1].runs if run.outcome is Outcome.OUT_OF_MEMORY]
        return missing_bytes("\n".join(said)) or server.log_facts.missing_bytes
