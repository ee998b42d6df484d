"""Every batch of small limits, by brute force, for tests; whether a server would run one, `is_admissible` says.

Read with `runpy` or by path, as `tiny_llms`.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations_with_replacement

from llmpilot_perfmodel.step_memory.batch import Batch, Layout, Rows
from llmpilot_tuner.domain.limits import Limits


def every_batch(limits: Limits, weight: int) -> Iterator[Batch]:
    """Yield every batch that can matter, and some that are not admissible."""
    if limits.rules.chunks_prefills:
        yield from chunked_batches(limits, weight)
    elif limits.rules.layout is Layout.PADDED:
        yield from padded_batches(limits)
    else:
        yield from packed_batches(limits, weight)


def grouped(lengths: tuple[int, ...], limits: Limits, *, new: bool) -> tuple[Rows, ...]:
    """Return requests of these tokens each, those that are not new at the end of their lives."""
    rows = []
    for length in sorted(set(lengths)):
        output = 1 if new else min(limits.most_new_tokens, length - 1)
        rows.append(Rows(request_count=lengths.count(length), input_tokens=length - output, output_tokens=output))
    return tuple(rows)


def packed_batches(limits: Limits, weight: int) -> Iterator[Batch]:
    """Yield every multiset of requests, as a prefill and as a decode step."""
    for count in range(1, limits.most_requests + 1):
        for lengths in combinations_with_replacement(range(2, limits.longest_sequence + 1), count):
            total = sum(lengths)
            if total <= weight:
                yield Batch(case="", prefill=grouped(lengths, limits, new=True), pool_tokens=weight)
                decode = grouped(lengths, limits, new=False)
                copied = limits.rules.extra_caches * total
                yield Batch(case="", decode=decode, pool_tokens=weight, copied_tokens=copied)


def chunked_batches(limits: Limits, weight: int) -> Iterator[Batch]:
    """Yield every multiset of chunks, of any context, and of decode steps."""
    size = limits.rules.block_size
    pool = weight // size * size
    kinds = [(0, 0, length) for length in range(2, limits.longest_sequence + 1)]
    kinds += [
        (read, before, 0)
        for read in range(1, limits.longest_sequence)
        for before in range(limits.longest_sequence - read)
        # Blocks are what limits context: a shorter one in as many blocks has nothing that this one has not.
        if (before + read + 1) % size == 0 or before + read + 1 == limits.longest_sequence or before == 0
    ]
    kinds = [kind for kind in kinds if not kind[2] or kind[2] % size == 0 or kind[2] == limits.longest_sequence]
    for count in range(1, limits.most_requests + 1):
        for chosen in combinations_with_replacement(kinds, count):
            prefill = tuple(
                Rows(request_count=1, input_tokens=read, output_tokens=1, context_tokens=before)
                for read, before, length in chosen
                if not length
            )
            decode = grouped(tuple(length for _, _, length in chosen if length), limits, new=False)
            yield Batch(case="", prefill=prefill, decode=decode, pool_tokens=pool)


def padded_batches(limits: Limits) -> Iterator[Batch]:
    """Yield every rectangle, those of requests that are not alike included, with every rectangle of residents."""
    pairs = [(i, o) for i in range(1, limits.longest_sequence) for o in range(1, limits.longest_sequence - i + 1)]
    ends = [(i, o) for i, o in pairs if o <= limits.most_new_tokens]
    if not limits.is_encoder_decoder:
        ends = [(i, o) for i, o in ends if o == min(limits.most_new_tokens, i + o - 1)]
    for count in range(1, limits.most_requests + 1):
        for inputs, outputs in ends:
            alike = (Rows(request_count=count, input_tokens=inputs, output_tokens=outputs),)
            yield Batch(case="", decode=alike)
            if count > 1:
                for other in ends:
                    rest = Rows(request_count=1, input_tokens=other[0], output_tokens=other[1])
                    yield Batch(case="", decode=(replace(alike[0], request_count=count - 1), rest))
        for length in range(1, limits.longest_sequence):
            prefill = (Rows(request_count=count, input_tokens=length, output_tokens=1),)
            yield Batch(case="", prefill=prefill)
            for resident_count in range(1, limits.most_requests - count + 1):
                for inputs, outputs in ends:
                    residents = (Rows(request_count=resident_count, input_tokens=inputs, output_tokens=outputs),)
                    yield Batch(case="", prefill=prefill, residents=residents)
