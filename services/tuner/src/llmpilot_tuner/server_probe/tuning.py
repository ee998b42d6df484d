"""Tunes an inference server itself, with at most two starts of it.

The first start has the weight that the formulas predict, or that the server itself takes. Where a corner case runs out
of memory and the server lives on, smaller weights are tried on it at once: their corner cases are batches that it
admits as well. The second start then verifies what was found, in a process that has never run out of memory.

Invariant: the weight that is returned is one at which every corner case was answered.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import replace

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.batching.policies import WeightDefinition
from llmpilot_perfmodel.step_memory.batch import Layout
from llmpilot_tuner.domain.events import (
    RunEvent,
    TuningEnded,
    TuningStarted,
)
from llmpilot_tuner.domain.plan import Plan, half_sequence_weight
from llmpilot_tuner.domain.probing import (
    NoSafeWeightError,
    ProbeError,
    ProbeFacts,
)
from llmpilot_tuner.domain.result import TuningResult
from llmpilot_tuner.domain.search import Search, plain_probe_count
from llmpilot_tuner.domain.verdict import curve, headroom
from llmpilot_tuner.server_probe.evidence import lower_weight
from llmpilot_tuner.server_probe.probes import Emit, ServerProbes, prober_facts
from llmpilot_tuner.server_probe.prompts import Prompts
from llmpilot_tuner.server_probe.session import (
    Session,
    StartOutOfMemoryError,
    running_server,
    started_server,
    target_violations,
)

_LEAST_PRECISION = 0.01
"""Finer steps are not worth the time of a real server."""


async def server_events(plan: Plan, *, predicted_weight: int) -> AsyncGenerator[RunEvent, None]:
    """Tune, and say what happens; ends with TuningEnded.

    Raises InvalidInputError, PreconditionError, ProbeError and NoSafeWeightError. A server that was started has ended
    when this is closed or cancelled.
    """
    if violations := target_violations(plan.spec):
        raise InvalidInputError(violations)
    events: asyncio.Queue[RunEvent | None] = asyncio.Queue()
    tuning = _ServerTuning(plan, predicted_weight=predicted_weight, emit=events.put_nowait)

    async def run() -> None:
        try:
            await tuning.run()
        finally:
            events.put_nowait(None)

    # A task of its own, because a generator that is left between two events must not leave a server behind.
    task = asyncio.create_task(run())
    try:
        while (event := await events.get()) is not None:
            yield event
        await task
    finally:
        task.cancel()
        await asyncio.wait({task})


class _ServerTuning:
    def __init__(self, plan: Plan, *, predicted_weight: int, emit: Emit) -> None:
        self._plan = plan
        self._spec, self._limits = plan.spec, plan.limits
        self._emit = emit
        self._problem = replace(plan.problem, precision=max(plan.spec.precision, _LEAST_PRECISION))
        self._predicted = predicted_weight
        self._prompts = Prompts(vocabulary_size=plan.config.spec.vocabulary_size, seed=plan.spec.seed)
        self._probes = ServerProbes(self._problem, plan.limits, soak_steps=plan.spec.soak_steps, emit=emit)
        self._facts: ProbeFacts | None = None
        self._is_in_force = True
        """Whether the server keeps to the weight that is probed, as it says or was told; else that is a guess."""
        self._started_seconds = time.monotonic()

    async def run(self) -> None:
        """Tune and emit every event."""
        is_started_here = self._spec.target is not None and bool(self._spec.target.command)
        weight, limit = await (self._tune_started() if is_started_here else self._tune_running())
        self._emit(TuningEnded(result=self._result(weight, limit)))

    @property
    def _has_pool(self) -> bool:
        """Whether the server sets its whole cache aside at its start, whatever the batch."""
        rules = self._limits.rules
        return rules.layout is Layout.PACKED and not rules.merges_batches

    async def _tune_started(self) -> tuple[int, str]:
        problem = self._problem
        block = self._limits.rules.block_size
        wanted = problem.down(self._predicted // block * block)  # a part of a block is no room
        first = min(max(wanted, problem.lowest), problem.highest)
        passed: int | None = None
        why = "the largest that the first start passed"
        try:
            async with started_server(self._spec, self._limits, self._prompts, first) as server:
                weight, limit = self._in_force(server, first)
                if await self._probes.probe(server, weight, "first start", is_final=True):
                    passed, room = weight, self._room(server, weight)
                    if room is None:
                        return weight, limit
                    second, why = room, "the server counts more memory than it was given"
                else:
                    second = await self._lower(server, weight)
        except StartOutOfMemoryError as error:
            self._probes.note(f"no start with a weight of {first:,}: {error}")
            facts = error.log_facts
            second = self._below(first, missing=facts.missing_bytes, room_tokens=facts.room_tokens)
            why = "less than what the server could not start with"
        self._probes.note(f"second and last start with a weight of {second:,}: {why}")
        try:
            async with started_server(self._spec, self._limits, self._prompts, second) as server:
                return await self._verify(server, second, passed)
        except StartOutOfMemoryError as error:
            if passed is not None:
                self._probes.note(f"no start with a weight of {second:,} after all: {error}")
                return passed, "memory"
            raise ProbeError(
                f"the server could start neither with a weight of {first:,} nor with {second:,}: {error}; see that "
                "nothing else uses the GPU, or lower the limits"
            ) from error

    async def _verify(self, server: Session, second: int, passed: int | None) -> tuple[int, str]:
        """Return what the second start shows; passed: what the first one did."""
        weight, _ = self._in_force(server, second)
        if weight > second and any(not probe.passed and probe.weight <= weight for probe in self._probes.probes):
            raise ProbeError(
                f"the server keeps to a weight of {weight:,} although it was told {second:,}, and it ran out of memory "
                'with that: put "{weight}" or a setting where its command says how large the batch may be'
            )
        if await self._probes.probe(server, weight, "second start", is_final=True):
            return weight, "memory"
        self._probes.lowered_from.append(weight)
        if passed is not None and passed < weight:
            self._probes.note(f"{weight:,} ran out of memory: {passed:,}, which the first start passed, is the result")
            return passed, "memory"
        if not self._has_pool:
            found = await self._probes.search_on(server, weight)
            if found is not None:
                self._probes.note(
                    f"{found:,} was passed by a server that was started with {weight:,}; no start was left to verify it"
                )
                return found, "memory"
        tried = ", ".join(f"{probe.weight:,}" for probe in self._probes.probes)
        raise ProbeError(
            f"the server ran out of memory in both starts (weights {tried}): see that nothing else uses the GPU, then "
            "tune again with less memory per GPU, which lowers the first weight"
        )

    async def _tune_running(self) -> tuple[int, str]:
        async with running_server(self._spec, self._limits, self._prompts) as server:
            weight, limit = self._in_force(server, None)
            self._probes.note("the server was running: only what it is set to was verified, nothing larger")
            if await self._probes.probe(server, weight, "what the server is set to", is_final=True):
                return weight, limit
            found = None if self._has_pool else await self._probes.search_on(server, weight)
            if found is None:
                lower = self._below(weight, missing=self._probes.missing_bytes(server))
                raise ProbeError(
                    f"the server runs out of memory at the weight of {weight:,} that it is set to: start it with less; "
                    f"{lower:,} may do, which nothing has verified"
                )
            self._probes.note(f"the server runs out of memory at {weight:,}: start it again with {found:,}")
            return found, "memory"

    def _in_force(self, server: Session, told: int | None) -> tuple[int, str]:
        """Return the weight that the server keeps to, within the limits, and why it is no larger."""
        self._say_started(server)
        problem = self._problem
        stated = server.facts.weight or server.log_facts.weight
        if stated is not None and stated < problem.lowest:
            raise NoSafeWeightError(
                f"the server has room for {stated:,} tokens, one longest request has {problem.lowest:,}: lower "
                "longest_sequence, or give it more memory"
            )
        is_own_count = False
        if stated is None:
            weight = self._predicted if told is None else told
            if told is None:
                self._is_in_force = False
                self._probes.note(
                    f"the server does not say what it is set to: {weight:,} is by prediction, it may admit less"
                )
        else:
            weight = stated
            is_own_count = told is None or abs(stated - told) >= max(problem.granule, self._limits.rules.block_size)
            if told is not None and is_own_count:
                self._probes.note(f"the server was told a weight of {told:,} and keeps to {stated:,}")
        limit = "the server's own count of its memory" if is_own_count else "memory"
        weight = max(problem.lowest, problem.down(weight))
        return (problem.highest, "limits") if weight >= problem.highest else (weight, limit)

    def _say_started(self, server: Session) -> None:
        if self._facts is not None:
            return
        self._facts = prober_facts(self._spec, self._limits, server, weight_bytes=int(self._problem.weight_bytes))
        self._emit(
            TuningStarted(
                facts=self._facts,
                lowest_weight=self._problem.lowest,
                highest_weight=self._problem.highest,
                predicted_weight=self._predicted,
            )
        )

    async def _lower(self, server: Session, weight: int) -> int:
        """Return what to start the server with after it ran out of memory at a weight."""
        if not self._has_pool:
            found = await self._probes.search_on(server, weight)
            if found is not None:
                return found
        return self._below(weight, missing=self._probes.missing_bytes(server))

    def _below(self, failed: int, *, missing: int | None, room_tokens: int | None = None) -> int:
        if failed <= self._problem.lowest:
            raise NoSafeWeightError(
                f"not even a maximum batch weight of {failed:,}, one longest request, is safe: lower longest_sequence, "
                "or give the LLM more memory or more GPUs"
            )
        return lower_weight(self._problem, failed, missing_bytes=missing, room_tokens=room_tokens)

    def _room(self, server: Session, weight: int) -> int | None:
        """Return the larger weight that the server itself counts memory for; None: no evidence of one."""
        ratio = server.log_facts.room_ratio
        if ratio is None:
            return None
        room = min(self._problem.highest, self._problem.down(weight * ratio))
        return room if room >= weight * (1 + self._problem.precision) else None

    def _margin(self, weight: int) -> int:
        """Return what of a weight no decode step had at once: that part was admitted, but is not proven.

        A server that sets its cache aside at its start has all of it in memory, whoever uses it. Raises ProbeError
        where nothing is proven: what a server that pads holds is no weight, and nobody says what it is set to.
        """
        if self._limits.rules.weight_definition is not WeightDefinition.TOKENS:
            if self._is_in_force:
                return 0
            raise ProbeError(
                "the server does not say what it is set to, and what it holds at once is not its weight, as it pads: "
                "let it be started here, with the weight in its command"
            )
        if self._has_pool and self._is_in_force:
            return 0
        held = self._probes.most_held(weight)
        proven = max(self._problem.lowest, self._problem.down(held))
        if proven >= weight:
            return 0
        self._probes.note(f"{held:,} of {weight:,} tokens were there at once: the rest is taken off")
        return weight - proven

    def _result(self, weight: int, limit: str) -> TuningResult:
        assert self._facts is not None  # noqa: S101 a server answered, or nothing was found
        search = Search(self._problem, self._probes.probes)
        runs = [run for probe in self._probes.probes if probe.weight == weight for run in probe.runs]
        margin = self._margin(weight)
        return TuningResult(
            max_batch_weight=weight - margin,
            limit=limit,
            facts=self._facts,
            probes=tuple(self._probes.probes),
            plain_probe_count=plain_probe_count(self._problem),
            headroom=headroom(search, weight - margin, runs),
            soak=self._probes.soak,
            margin_weight=margin,
            curve=curve(search, weight - margin),
            half_sequence_weight=half_sequence_weight(self._plan),
            predicted_weight=self._predicted,
            elapsed_seconds=time.monotonic() - self._started_seconds,
            notes=tuple(self._probes.notes),
        )
