"""The search for the largest weight whose corner cases all pass.

The predicted root is probed, then the least more that settles it; what was measured corrects the prediction. A probe is
only made where bisection could still end within the count that plain binary search takes at worst, so that a wrong
prediction never costs more than none.

Invariant: the next weight is a function of the problem and the probes recorded, so that a search that was interrupted
goes on as it would have.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from llmpilot_perfmodel.step_memory.batch import Batch
from llmpilot_tuner.domain.fits import Fits
from llmpilot_tuner.domain.probing import NoSafeWeightError, Outcome, Probe

_CAUTION = (0.15, 0.4, 0.7)
"""Share of the memory beside the weights that is not counted on after so many failures in a row."""
_GALLOP = 4
"""Where peaks are not known, steps above what passed grow by it, lest a prediction that is too high make it crawl."""
_SPARE = 1
"""Probes kept back: rounding to the granule may cost bisection one."""
_NOISE = 0.01
"""Peaks of one case that fall by more while the weight rises are not monotone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is searched; `lowest` and `highest` are multiples of `granule`, and 1 <= lowest <= highest."""

    lowest: int
    highest: int
    granule: int
    precision: float
    """How far below the largest safe weight the one found may be, as a share of it."""
    capacity_bytes: int
    cases: Callable[[int], Sequence[Batch]]
    """The corner cases of a weight."""
    predict: Callable[[Batch], float] | None
    """The peak of a batch, weights included; None: nothing is known, and the search bisects."""
    weight_bytes: float

    def down(self, weight: float) -> int:
        """Return the largest multiple of the granule that is not above."""
        return int(weight // self.granule) * self.granule

    def is_settled(self, passed: int, failed: int) -> bool:
        """Whether the largest weight that passed is near enough to the smallest that failed."""
        return passed >= (1 - self.precision) * (failed - self.granule)

    def step(self, passed: int) -> int:
        """Return the largest weight whose failure settles the search."""
        return max(passed + self.granule, self.down(passed / (1 - self.precision) + self.granule))

    def middle(self, low: int, high: int) -> int:
        """Return the geometric middle of two weights, strictly between them."""
        middle = self.down(math.sqrt(max(low, self.granule) * high))
        return min(max(middle, low + self.granule), high - self.granule)


@dataclass(frozen=True, slots=True, kw_only=True)
class Next:
    """The next weight to probe."""

    weight: int
    why: str


class Search:
    """Knows what was probed, and says what to probe next."""

    def __init__(self, problem: Problem, probes: Iterable[Probe] = ()) -> None:
        self.problem = problem
        self.notes: list[str] = []
        self._fits = Fits(problem.predict, weight_bytes=problem.weight_bytes) if problem.predict else None
        self._probes: list[Probe] = []
        self.plain_probe_count = plain_probe_count(problem)
        for probe in probes:
            self.record(probe)

    @property
    def probes(self) -> tuple[Probe, ...]:
        """What was probed, in order."""
        return tuple(self._probes)

    @property
    def passed(self) -> int | None:
        """The largest weight that passed below every one that failed."""
        return max((p.weight for p in self._probes if p.passed and p.weight < self.failed), default=None)

    @property
    def failed(self) -> int:
        """The smallest weight that failed; one more than the highest where none did."""
        above = self.problem.highest + self.problem.granule
        return min((probe.weight for probe in self._probes if not probe.passed), default=above)

    def record(self, probe: Probe) -> None:
        """Learn from a probe. A larger weight that passed is not believed once a smaller one has failed."""
        self._probes.append(probe)
        if self._fits is not None:
            self._fits.learn(probe)
        for other in self._probes[:-1]:
            self._note_contradiction(*sorted((other, probe), key=lambda each: each.weight))

    def next(self) -> Next | None:
        """Return what to probe; None: the search has ended. Raises NoSafeWeightError where the lowest failed."""
        problem, passed, failed = self.problem, self.passed, self.failed
        if failed <= problem.lowest:
            raise NoSafeWeightError(self._why_none())
        if passed is not None and (passed >= problem.highest or problem.is_settled(passed, failed)):
            return None
        low = problem.lowest if passed is None else passed
        if passed is None and problem.is_settled(low, failed):
            return Next(weight=low, why="the lowest")
        wanted = self._wanted(passed, failed)
        left = self.plain_probe_count - len(self._probes) - _SPARE
        weight = low if wanted.weight == low else _affordable(problem, wanted.weight, low, failed, left)
        return wanted if weight == wanted.weight else Next(weight=weight, why="nearer to bisection")

    def ordered_cases(self, weight: int) -> tuple[Batch, ...]:
        """Return the corner cases of a weight, those that are expected to fail first."""
        cases = tuple(self.problem.cases(weight))
        return cases if self._fits is None else tuple(sorted(cases, key=self._fits.predicted_bytes, reverse=True))

    def predicted_bytes(self, batch: Batch) -> float | None:
        """Return the peak that a batch is expected to have; None: nothing is known."""
        return None if self._fits is None else self._fits.predicted_bytes(batch)

    def root(self, *, capacity_bytes: float | None = None, below: int | None = None) -> int | None:
        """Return the largest weight whose cases are expected to fit; None: not even the lowest, or nothing is known."""
        fits, capacity = self._fits, self.problem.capacity_bytes if capacity_bytes is None else capacity_bytes
        if fits is None:
            return None
        high = self.problem.highest if below is None else below - self.problem.granule
        return largest_weight(
            self.problem,
            high,
            lambda weight: all(fits.predicted_bytes(b) <= capacity for b in self.problem.cases(weight)),
        )

    def _wanted(self, passed: int | None, failed: int) -> Next:
        problem = self.problem
        failures = self._failures_in_a_row()
        if self._fits is None or failures > len(_CAUTION):
            return Next(weight=problem.middle(passed or problem.lowest, failed), why="bisection")
        caution = _CAUTION[failures - 1] if failures else 0.0
        room = problem.capacity_bytes - problem.weight_bytes
        root = self.root(capacity_bytes=problem.capacity_bytes - caution * room, below=failed)
        if root is not None and failures:
            root = min(root, problem.down((1 - caution) * failed))
        if passed is None:
            return Next(weight=max(root or 0, problem.lowest), why="predicted root")
        step = problem.step(passed)
        if root is None or root < step:
            gallop = (step - passed) * (1 if self._is_measured(passed) else _GALLOP ** (self._passes_in_a_row() - 1))
            return Next(weight=min(passed + gallop, failed - problem.granule), why="a step above what passed")
        return Next(weight=root, why="predicted root" if not failures else "root with caution")

    def _failures_in_a_row(self) -> int:
        return sum(1 for _ in takewhile(lambda probe: not probe.passed, reversed(self._probes)))

    def _is_measured(self, weight: int) -> bool:
        return any(run.peak_bytes for probe in self._probes if probe.weight == weight for run in probe.runs)

    def _passes_in_a_row(self) -> int:
        return max(1, sum(1 for _ in takewhile(lambda probe: probe.passed, reversed(self._probes))))

    def _why_none(self) -> str:
        runs = [run for probe in self._probes if probe.weight == self.failed for run in probe.runs]
        case = next(run.batch.case for run in runs if run.outcome is Outcome.OUT_OF_MEMORY)
        return (
            f"not even a maximum batch weight of {self.failed:,}, one longest request, fits into "
            f"{self.problem.capacity_bytes:,} bytes: case {case} ran out of memory; lower longest_sequence, or give "
            "the LLM more memory or more GPUs"
        )

    def _note_contradiction(self, smaller: Probe, larger: Probe) -> None:
        if smaller.weight < larger.weight and larger.passed and not smaller.passed:
            self.notes.append(
                f"weight {smaller.weight:,} failed although {larger.weight:,} passed: only what is below counts"
            )
        peaks = {run.batch.case: run.peak_bytes for run in smaller.runs if run.outcome is Outcome.PASSED}
        for run in larger.runs:
            before = peaks.get(run.batch.case)
            if before and run.peak_bytes and run.outcome is Outcome.PASSED and run.peak_bytes < before * (1 - _NOISE):
                self.notes.append(
                    f"case {run.batch.case} took {before:,} bytes at {smaller.weight:,} and fewer, {run.peak_bytes:,}, "
                    f"at {larger.weight:,}: its memory does not only grow"
                )


def belongs(problem: Problem, probe: Probe) -> bool:
    """Return whether a probe is one of this problem: it ran every case of its weight, or until the last one failed."""
    if not problem.lowest <= probe.weight <= problem.highest or probe.weight % problem.granule:
        return False
    cases, ran = set(problem.cases(probe.weight)), {run.batch for run in probe.runs}
    return ran == cases if probe.passed else ran <= cases


def largest_weight(problem: Problem, high: int, fits: Callable[[int], bool]) -> int | None:
    """Return the largest weight from the lowest to `high` that fits, by bisection; None: not even the lowest."""
    if high < problem.lowest or not fits(problem.lowest):
        return None
    low = problem.lowest
    if fits(high):
        return high
    while high - low > problem.granule:
        middle = problem.down((low + high) // 2)
        middle = middle if middle > low else low + problem.granule
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def plain_probe_count(problem: Problem) -> int:
    """Return the most probes that plain binary search makes, which halves the range until it is settled."""
    low, high, count = problem.lowest, problem.highest + problem.granule, 0
    while high - low > problem.granule and not problem.is_settled(low, high):
        high = max(problem.down((low + high) // 2), low + problem.granule)  # below, the precision is finest
        count += 1
    return count


def _bisections(problem: Problem, low: int, high: int) -> int:
    """Return the most probes that geometric bisection makes between a weight that passed and one that failed."""
    count = 0
    while high - low > problem.granule and not problem.is_settled(low, high):
        middle = problem.middle(low, high)
        low, high = (middle, high) if high / middle > middle / low else (low, middle)
        count += 1
    return count


def _affordable(problem: Problem, wanted: int, low: int, high: int, left: int) -> int:
    """Return the weight nearest to the wanted one from which bisection can end with `left` probes, it included."""

    def is_affordable(weight: int) -> bool:
        return 1 + max(_bisections(problem, low, weight), _bisections(problem, weight, high)) <= left

    wanted = min(max(wanted, low + problem.granule), high - problem.granule)
    if is_affordable(wanted):
        return wanted
    good, bad = problem.middle(low, high), wanted
    while abs(good - bad) > problem.granule:
        between = problem.down((good + bad) // 2)
        if between in (good, bad):
            break
        good, bad = (between, bad) if is_affordable(between) else (good, between)
    return good
