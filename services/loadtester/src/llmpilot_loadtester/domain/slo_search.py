"""The search for the largest load that meets a service level.

Invariant: what comes next, and the answer, follow from the results so far alone, whatever process measured them.

A load meets the service level if so many of its requests are within the limits that the true share is at least the
wanted one at the stated confidence; it fails if the true share is below it at that confidence (Clopper & Pearson's
bounds). Otherwise it is measured again and the counts are added, at most three times; still undecided, it counts as not
met, which is the safe side. As a decision may look three times, each look has a third of the error.

Loads are doubled from the lowest until one is not met, then the interval between the largest that is met and the
smallest that is not is halved until it is as narrow as the precision asks; users are whole. This takes the share of
good requests to fall with the load. A stage whose numbers do not count ends the search with what is known: the load
tester, not the server, was too slow. So does the last of `LARGEST_STAGE_COUNT` stages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmpilot_loadtester.domain.binomial import chance_of_at_least, chance_of_at_most
from llmpilot_loadtester.domain.results import StageResult
from llmpilot_loadtester.domain.spec import (
    LARGEST_STAGE_COUNT,
    Load,
    LoadKind,
    LoadSearch,
    ServiceLevel,
    Stage,
    UserStep,
)

LOOK_COUNT = 3
"""Measurements of one load at most."""
SIGNIFICANT_DIGITS = 6
"""Of rates, so that they are the same in every process and read well."""
_SPOILT = " The search ended early, as the numbers of its last stage do not count."
_TOO_LONG = f" The search ended early, after {LARGEST_STAGE_COUNT} stages: ask for less precision or narrower bounds."


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What is known of one load."""

    load: float
    good_count: int = 0
    request_count: int = 0
    look_count: int = 0
    meets: bool | None = None
    """None: undecided."""
    is_sure: bool = True
    """False: it counts as not met for having been measured often enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SloSearch:
    """Looks for the largest load, as `StagePlan` and with an answer."""

    search: LoadSearch
    service_level: ServiceLevel

    @property
    def stage_count(self) -> int:
        """Stages at most."""
        doublings = math.ceil(max(math.log2(self.search.high) - math.log2(self.search.low), 0.0)) + 1
        halvings = math.ceil(-math.log2(self.search.precision)) + 1
        return min(LOOK_COUNT * (doublings + halvings), LARGEST_STAGE_COUNT)

    def next_stage(self, results: Sequence[StageResult]) -> Stage | None:
        """Return the stage after these results; None: the search is over."""
        load = self._next_load(results)
        if load is None:
            return None
        return Stage(
            load=self._load_of(load),
            warm_up_seconds=self.search.warm_up_seconds,
            measure_seconds=self.search.measure_seconds,
        )

    def found_load(self, results: Sequence[StageResult]) -> float | None:
        """Return the largest load that met the service level so far; None: none did."""
        met, _ = _bounds(self.tallies(results))
        return met.load if met else None

    def answer(self, results: Sequence[StageResult]) -> str:
        """Return what is known, in sentences."""
        met, unmet = _bounds(self.tallies(results))
        if met is None and unmet is None:
            return f"No load was decided.{self._why_early(results)}"
        facts = [f"met by {self._words(met)}"] if met is not None else []
        if unmet is not None:
            facts.append(f"not met by {self._words(unmet)}")
            if not unmet.is_sure:
                facts.append(f"{LOOK_COUNT} measurements left that undecided, which counts as not met")
        elif met is not None and met.load >= self.search.high:
            facts.append("more was not asked for")
        share, confidence = (f"{100 * part:.4g} %" for part in (self.service_level.share, self.search.confidence))
        return (
            f"The service level is {'; '.join(facts)}. Each decision, whether {share} of the requests are within all "
            f"limits, is {confidence} sure.{self._why_early(results)}"
        )

    def _why_early(self, results: Sequence[StageResult]) -> str:
        if _is_spoilt(results):
            return _SPOILT
        is_cut = len(results) >= LARGEST_STAGE_COUNT and self._wanted_load(results) is not None
        return _TOO_LONG * is_cut

    def tallies(self, results: Sequence[StageResult]) -> list[Tally]:
        """Return what is known of every load, in the order in which they were first measured."""
        counts: dict[float, Tally] = {}
        for result in results:
            if _is_invalid(result):
                continue
            load = _load_value(result.stage.load)
            before = counts.get(load, Tally(load=load))
            share = result.metrics.good_share or 0.0
            counts[load] = Tally(
                load=load,
                good_count=before.good_count + round(share * result.metrics.request_count),
                request_count=before.request_count + result.metrics.request_count,
                look_count=before.look_count + 1,
            )
        return [self._decided(tally) for tally in counts.values()]

    def _decided(self, tally: Tally) -> Tally:
        error = (1 - self.search.confidence) / LOOK_COUNT
        good, total, share = tally.good_count, tally.request_count, self.service_level.share
        meets: bool | None = None
        is_sure = True
        if chance_of_at_least(good, total, share) <= error:
            meets = True
        elif chance_of_at_most(good, total, share) <= error:
            meets = False
        elif tally.look_count >= LOOK_COUNT:
            meets, is_sure = False, False
        return replace(tally, meets=meets, is_sure=is_sure)

    def _next_load(self, results: Sequence[StageResult]) -> float | None:
        if _is_spoilt(results) or len(results) >= LARGEST_STAGE_COUNT:
            return None
        return self._wanted_load(results)

    def _wanted_load(self, results: Sequence[StageResult]) -> float | None:
        tallies = self.tallies(results)
        for tally in tallies:
            if tally.meets is None:
                return tally.load
        met, unmet = _bounds(tallies)
        if met is None:
            return None if unmet else self.search.low
        if unmet is None:
            return None if met.load >= self.search.high else min(self._rounded(2 * met.load), self.search.high)
        return self._between(met.load, unmet.load)

    def _between(self, met: float, unmet: float) -> float | None:
        """Return the load halfway; None: they are near enough."""
        if unmet - met <= self.search.precision * met:
            return None
        middle = self._rounded((met + unmet) / 2)
        return middle if met < middle < unmet else None

    def _rounded(self, load: float) -> float:
        if self.search.kind is LoadKind.USERS:
            return float(math.floor(load))
        return float(f"{load:.{SIGNIFICANT_DIGITS}g}")

    def _load_of(self, load: float) -> Load:
        if self.search.kind is LoadKind.USERS:
            return Load(kind=LoadKind.USERS, user_steps=(UserStep(at_seconds=0.0, users_count=round(load)),))
        return Load(kind=self.search.kind, rate_per_second=load)

    def _words(self, tally: Tally) -> str:
        unit = "requests/s" if self.search.kind is not LoadKind.USERS else "user" if tally.load == 1 else "users"
        return f"{tally.load:g} {unit} ({tally.good_count:,} of {tally.request_count:,} requests)"


def _bounds(tallies: Sequence[Tally]) -> tuple[Tally | None, Tally | None]:
    """Return the largest load that is met and the smallest that is not."""
    unmet = min((tally for tally in tallies if tally.meets is False), key=_load, default=None)
    met = [tally for tally in tallies if tally.meets and (unmet is None or tally.load < unmet.load)]
    return max(met, key=_load, default=None), unmet


def _load(tally: Tally) -> float:
    return tally.load


def _load_value(load: Load) -> float:
    return float(load.user_steps[0].users_count) if load.is_closed else load.rate_per_second


def _is_spoilt(results: Sequence[StageResult]) -> bool:
    return any(map(_is_invalid, results))


def _is_invalid(result: StageResult) -> bool:
    """Whether a stage tells nothing of the server; one that does not count only as all requests failed does."""
    all_failed = result.metrics.request_count > 0 and not result.metrics.ok_count
    return not result.verdict.is_valid and not (all_failed and len(result.verdict.reasons) == 1)
