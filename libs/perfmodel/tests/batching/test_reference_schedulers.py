"""The compiled schedulers against naive ones, written for the eye: lists, and every future moment tried out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpilot_perfmodel.batching.engine import Engine
from llmpilot_perfmodel.batching.policies import TgiPolicy, TgisPolicy, Vllm0Policy, Vllm1Policy
from llmpilot_perfmodel.steps.step_time import StepTables

Drive = Callable[..., list[list[float]]]
ROUNDING = 1e-9


@dataclass(slots=True, eq=False)
class Served:
    """A request as the naive servers see it."""

    arrival: float
    input_tokens: int
    output_tokens: int
    most: int
    hashes: tuple[int, ...] = ()
    times: list[float] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self.input_tokens + len(self.times)

    @property
    def remaining(self) -> int:
        """Tokens that may still come."""
        return self.most - len(self.times)

    @property
    def is_done(self) -> bool:
        """Whether all tokens have come."""
        return len(self.times) == self.output_tokens


def seconds(prefill: Sequence[int], decodes: int) -> float:
    return (2.0 if prefill else 1.0) + 0.5 * decodes + 0.25 * sum(prefill) + 0.5 * len(prefill)


def arrive(requests: list[Served], waiting: list[Served], now: float) -> None:
    while requests and requests[0].arrival <= now:
        waiting.append(requests.pop(0))


class NaiveTgis:
    """Tries out the future of every batch."""

    def __init__(self, policy: TgisPolicy) -> None:
        self.policy = policy
        self.batch: list[Served] = []
        self.waiting: list[Served] = []

    def peak(self, batch: list[Served], new: Served) -> int:
        """Try every future step until the new request ends."""
        weights = [0]
        for later in range(1, new.remaining + 1):
            lengths = [one.length + later for one in batch if one.remaining >= later]
            if self.policy.is_padded:
                weights.append(len(lengths) * max(lengths) ** 2)
            else:
                weights.append(sum(lengths))
        return max(weights)

    def admitted(self, smallest: int) -> list[Served]:
        """Return whom the next prefill takes."""
        if len(self.waiting) < smallest or len(self.batch) + smallest > self.policy.max_batch_size:
            return []
        chosen: list[Served] = []
        cutoff = float("inf")
        for index, one in enumerate(self.waiting):
            if one.arrival > cutoff or len(self.batch) + len(chosen) == self.policy.max_batch_size:
                break
            if self.peak([*self.batch, *chosen, one], one) <= self.policy.max_batch_weight:
                chosen.append(one)
                continue
            if len(chosen) + len(self.waiting) - index - 1 < smallest:
                return []
            cutoff = min(cutoff, one.arrival + 1)
        return chosen

    def run(self, requests: list[Served]) -> None:
        """Serve all, and write down when their tokens came."""
        now, since, must_decode = 0.0, 1, False
        while requests or self.waiting or self.batch:
            arrive(requests, self.waiting, now)
            if not self.waiting and not self.batch:
                now = requests[0].arrival
                continue
            size, most = len(self.batch), self.policy.max_waiting_tokens
            smallest = 1 if size <= 1 or since >= most else max(1, size * (most - since) // most)
            is_ending = [one.remaining for one in self.batch] == [1]
            new = [] if must_decode or is_ending else self.admitted(smallest)
            if new:
                longest = max(one.input_tokens for one in new)
                now += seconds([longest if self.policy.is_padded else one.input_tokens for one in new], 0)
                self.waiting = [one for one in self.waiting if one not in new]
                must_decode, since = bool(self.batch), 1
            else:
                now += seconds([], size)
                must_decode, since = False, since + 1
            for one in new or self.batch:
                one.times.append(now)
            self.batch = [one for one in [*self.batch, *new] if not one.is_done]


class NaiveTgi:
    """Adds up what every running and every new request may ever hold."""

    def __init__(self, policy: TgiPolicy) -> None:
        self.policy = policy
        self.batch: list[Served] = []
        self.waiting: list[Served] = []

    def admitted(self, smallest: int) -> list[Served]:
        """Return whom the next prefill takes: the longest beginning of the queue that fits, if that is enough."""
        for count in range(len(self.waiting), smallest - 1, -1):
            new = self.waiting[:count]
            held = sum(one.input_tokens + one.most for one in [*self.batch, *new])
            prefill = sum(one.input_tokens for one in new)
            if (
                held <= self.policy.max_batch_total_tokens
                and prefill <= self.policy.max_batch_prefill_tokens
                and len(self.batch) + count <= self.policy.max_batch_size
            ):
                return new
        return []

    def run(self, requests: list[Served]) -> None:
        """Serve all, and write down when their tokens came."""
        now, since, must_decode = 0.0, 1, False
        while requests or self.waiting or self.batch:
            arrive(requests, self.waiting, now)
            if not self.waiting and not self.batch:
                now = requests[0].arrival
                continue
            patient = self.batch and since < self.policy.max_waiting_tokens
            smallest = int(len(self.batch) * self.policy.waiting_served_ratio) if patient else 1
            new = [] if must_decode else self.admitted(max(1, smallest))
            if new:
                now += seconds([one.input_tokens for one in new], 0)
                self.waiting = self.waiting[len(new) :]
                must_decode, since = bool(self.batch), 1
            else:
                now += seconds([], len(self.batch))
                must_decode, since = False, since + 1
            for one in new or self.batch:
                one.times.append(now)
            self.batch = [one for one in [*self.batch, *new] if not one.is_done]


class NaiveVllm0:
    """Counts blocks anew at every step."""

    def __init__(self, policy: Vllm0Policy) -> None:
        self.policy = policy
        self.batch: list[Served] = []
        self.waiting: list[Served] = []
        self.held: dict[int, int] = {}
        """Tokens with a place in a block, by identity."""

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return self.policy.block_count - sum(-(-tokens // self.policy.block_size) for tokens in self.held.values())

    def admitted(self) -> list[Served]:
        """Return whom the next prefill takes, with their blocks."""
        new: list[Served] = []
        while self.waiting and len(self.batch) + len(new) < self.policy.max_num_seqs:
            lengths = [one.length for one in [*new, self.waiting[0]]]
            padded = len(lengths) * max(lengths)
            total = sum(lengths) if self.policy.max_paddings is None else padded
            is_too_padded = self.policy.max_paddings is not None and padded - sum(lengths) > self.policy.max_paddings
            self.held[id(self.waiting[0])] = lengths[-1]
            if (
                self.free < self.policy.block_count // 100
                or total > self.policy.max_num_batched_tokens
                or is_too_padded
            ):
                del self.held[id(self.waiting[0])]
                break
            new.append(self.waiting.pop(0))
        return new

    def make_room(self) -> None:
        """Give every running sequence a place for a token, from the oldest on."""
        place = 0
        while place < len(self.batch):
            one = self.batch[place]
            while self.free < 1 and one in self.batch:
                victim = self.batch.pop()
                del self.held[id(victim)]
                self.waiting.insert(0, victim)
            if one in self.batch:
                self.held[id(one)] = one.length
                place += 1

    def run(self, requests: list[Served]) -> None:
        """Serve all, and write down when their tokens came."""
        now = 0.0
        while requests or self.waiting or self.batch:
            arrive(requests, self.waiting, now)
            if not self.waiting and not self.batch:
                now = requests[0].arrival
                continue
            new = self.admitted()
            if not new:
                self.make_room()
                if not self.batch:
                    continue
            lengths = [one.length for one in new]
            if new and self.policy.max_paddings is not None:
                lengths = [max(lengths)] * len(new)
            now += seconds(lengths, 0 if new else len(self.batch))
            for one in new or self.batch:
                one.times.append(now)
                if one.is_done:
                    del self.held[id(one)]
            self.batch = [one for one in [*self.batch, *new] if not one.is_done]


class NaiveVllm1:
    """Looks for blocks from the first to the last."""

    def __init__(self, policy: Vllm1Policy) -> None:
        self.policy = policy
        self.batch: list[Served] = []
        self.waiting: list[Served] = []
        self.free = list(range(policy.block_count))
        self.users = dict.fromkeys(self.free, 0)
        self.content: dict[int, int] = {}
        """Block to hash."""

    def block_of(self, key: int) -> int | None:
        """Return the block that has had that content the longest."""
        return next((block for block, other in self.content.items() if other == key), None)

    def prefix(self, one: Served) -> list[int]:
        """Return the leading blocks that are there already."""
        found: list[int] = []
        for key in one.hashes[: (one.length - 1) // self.policy.block_size]:
            block = self.block_of(key)
            if block is None or not self.policy.enable_prefix_caching:
                break
            found.append(block)
        return found

    def wanted(self, one: Served, tokens: int, prefix: list[int]) -> int:
        """Return how many more blocks a sequence needs for its tokens."""
        return -(-tokens // self.policy.block_size) - len(one.blocks) - len(prefix)

    def can_take(self, one: Served, tokens: int, prefix: list[int]) -> bool:
        """Return whether there are as many."""
        return self.wanted(one, tokens, prefix) <= len([block for block in self.free if block not in prefix])

    def take(self, one: Served, tokens: int, prefix: list[int]) -> bool:
        """Give a sequence blocks for its tokens, if there are enough."""
        if not self.can_take(one, tokens, prefix):
            return False
        wanted = self.wanted(one, tokens, prefix)
        for block in prefix:
            if block in self.free:
                self.free.remove(block)
        fresh = [self.free.pop(0) for _ in range(wanted)]
        for block in fresh:
            self.content.pop(block, None)
        for block in (*prefix, *fresh):
            self.users[block] += 1
            one.blocks.append(block)
        for key, block in zip(one.hashes[: tokens // self.policy.block_size], one.blocks, strict=False):
            self.content.setdefault(block, key)
        return True

    def release(self, one: Served) -> None:
        """Free the blocks of a sequence, its last first."""
        for block in reversed(one.blocks):
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)
        one.blocks = []

    def schedule(self) -> dict[int, int]:
        """Return tokens by place in the batch."""
        budget, plan, was_preempted, place = self.policy.max_num_batched_tokens, {}, False, 0
        while place < len(self.batch) and budget:
            one = self.batch[place]
            tokens = min(one.length - one.computed, budget)
            while one in self.batch and not self.take(one, one.computed + tokens, []):
                victim = self.batch.pop()
                self.release(victim)
                victim.computed, was_preempted = 0, True
                self.waiting.insert(0, victim)
            if one in self.batch:
                plan[place] = tokens
                budget -= tokens
                place += 1
        while self.waiting and budget and not was_preempted and len(self.batch) < self.policy.max_num_seqs:
            one, prefix = self.waiting[0], self.prefix(self.waiting[0])
            computed = len(prefix) * self.policy.block_size
            tokens = min(one.length - computed, budget)
            if not self.can_take(one, one.length, prefix):
                break
            self.take(one, computed + tokens, prefix)
            one.computed = computed
            plan[len(self.batch)] = tokens
            self.batch.append(self.waiting.pop(0))
            budget -= tokens
        return plan

    def run(self, requests: list[Served]) -> None:
        """Serve all, and write down when their tokens came."""
        now = 0.0
        while requests or self.waiting or self.batch:
            arrive(requests, self.waiting, now)
            if not self.waiting and not self.batch:
                now = requests[0].arrival
                continue
            plan = self.schedule()
            work = [(self.batch[place], tokens) for place, tokens in plan.items()]
            decodes = [tokens for one, tokens in work if tokens == 1 and one.computed >= one.input_tokens]
            now += seconds(
                [tokens for one, tokens in work if tokens > 1 or one.computed < one.input_tokens], len(decodes)
            )
            for one, tokens in work:
                one.computed += tokens
                if one.computed == one.length:
                    one.times.append(now)
                    if one.is_done:
                        self.release(one)
            self.batch = [one for one in self.batch if not one.is_done]


def sequences(largest: int) -> st.SearchStrategy[list[Served]]:
    one = st.builds(
        lambda arrival, tokens, output, more, kind: Served(
            arrival / 4, tokens, output, output + more, tuple(100 * kind + block for block in range(tokens // 4))
        ),
        arrival=st.integers(0, 120),
        tokens=st.integers(1, largest),
        output=st.integers(1, largest),
        more=st.integers(0, 3),
        kind=st.integers(1, 3),
    )
    return st.lists(one, min_size=1, max_size=14).map(lambda items: sorted(items, key=lambda item: item.arrival))


def compare(
    drive: Drive, engine: Engine, naive: NaiveTgis | NaiveTgi | NaiveVllm0 | NaiveVllm1, requests: list[Served]
) -> None:
    rows = [(one.arrival, one.input_tokens, one.output_tokens, one.most) for one in requests]
    tokens = drive(engine, rows, [one.hashes for one in requests])
    naive.run(list(requests))
    assert tokens == [pytest.approx(one.times, abs=ROUNDING) for one in requests]
    assert (engine.running_count, engine.waiting_count, engine.used_memory_share) == (0, 0, 0)


@given(
    requests=sequences(12),
    weight=st.integers(27, 80),
    size=st.integers(1, 8),
    waiting=st.integers(1, 6),
    is_padded=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_tgis_follows_the_naive_scheduler(
    *,
    drive: Drive,
    tables: StepTables,
    requests: list[Served],
    weight: int,
    size: int,
    waiting: int,
    is_padded: bool,
) -> None:
    policy = TgisPolicy(
        max_batch_weight=weight**2 if is_padded else weight,
        max_batch_size=size,
        max_waiting_tokens=waiting,
        is_padded=is_padded,
    )
    compare(drive, Engine(policy=policy, tables=tables), NaiveTgis(policy), requests)


@given(
    requests=sequences(12),
    total=st.integers(27, 80),
    prefill=st.integers(12, 40),
    size=st.integers(1, 8),
    waiting=st.integers(0, 6),
    ratio=st.sampled_from([0.0, 0.3, 1.2]),
)
@settings(deadline=None, max_examples=150)
def test_tgi_follows_the_naive_scheduler(
    *,
    drive: Drive,
    tables: StepTables,
    requests: list[Served],
    total: int,
    prefill: int,
    size: int,
    waiting: int,
    ratio: float,
) -> None:
    policy = TgiPolicy(
        max_batch_total_tokens=total,
        max_batch_prefill_tokens=prefill,
        max_batch_size=size,
        max_waiting_tokens=waiting,
        waiting_served_ratio=ratio,
    )
    compare(drive, Engine(policy=policy, tables=tables), NaiveTgi(policy), requests)


@given(
    requests=sequences(24),
    blocks=st.one_of(st.integers(13, 40), st.integers(100, 110)),
    budget=st.integers(51, 90),
    size=st.integers(1, 8),
    paddings=st.one_of(st.none(), st.integers(0, 20)),
)
@settings(deadline=None, max_examples=150)
def test_vllm0_follows_the_naive_scheduler(
    *,
    drive: Drive,
    tables: StepTables,
    requests: list[Served],
    blocks: int,
    budget: int,
    size: int,
    paddings: int | None,
) -> None:
    policy = Vllm0Policy(
        block_count=blocks, block_size=4, max_num_batched_tokens=budget, max_num_seqs=size, max_paddings=paddings
    )
    compare(drive, Engine(policy=policy, tables=tables), NaiveVllm0(policy), requests)


@given(
    requests=sequences(24),
    blocks=st.integers(13, 40),
    budget=st.integers(1, 30),
    size=st.integers(1, 8),
    caching=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_vllm1_follows_the_naive_scheduler(
    *,
    drive: Drive,
    tables: StepTables,
    requests: list[Served],
    blocks: int,
    budget: int,
    size: int,
    caching: bool,
) -> None:
    policy = Vllm1Policy(
        block_count=blocks,
        block_size=4,
        max_num_batched_tokens=budget,
        max_num_seqs=size,
        enable_prefix_caching=caching,
    )
    compare(drive, Engine(policy=policy, tables=tables), NaiveVllm1(policy), requests)
