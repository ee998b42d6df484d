"""Corner cases of a server that reads long inputs in chunks, beside the decode steps of other requests (vLLM).

The pool of the cache is as large as the blocks that the weight has room for, whatever lies in it: what differs is the
step. Its tokens, of chunks and decodes together, are at most the prefill limit; every request in it has a row of
logits; and a chunk attends to all that its request has read before. So: a chunk as long as the step, at the end of the
longest sequence; the same beside as many decode steps as there may be; and a step of decodes alone, which the former
exceeds in all that is counted, but which other kernels run (a server captures a graph for it).
"""

from collections.abc import Iterator

import numpy as np

from llmpilot_perfmodel.step_memory.batch import Batch, Rows
from llmpilot_tuner.domain.corners_candidates import SHORTEST, grown
from llmpilot_tuner.domain.corners_decoder import Groups, ragged
from llmpilot_tuner.domain.corners_hull import needed
from llmpilot_tuner.domain.corners_names import named
from llmpilot_tuner.domain.limits import Limits

Chunks = list[tuple[int, int, int]]
"""Counts of requests, tokens that each reads, and tokens that each has read before."""
Step = tuple[Chunks, Groups]
"""What a step reads; and of what it decodes, counts of requests and tokens of each."""


def chunked_corners(limits: Limits, weight: int) -> Iterator[Batch]:
    """Yield the corner cases of a server that reads in chunks."""
    size = limits.rules.block_size
    blocks = pool_blocks(limits, weight)
    counts = range(1, min(limits.most_requests, blocks // _fewest_blocks(size)) + 1)
    steps = [step for count in counts for step in _largest_steps(limits, blocks, count)]
    features = np.array([_features(step) for step in steps], dtype=np.float64)
    kept = sorted({*needed(features[:, :3]), *needed(features[:, [0, 3]])})
    if limits.prompt_logprobs:
        most = max(range(len(steps)), key=lambda index: (sum(n * read for n, read, _ in steps[index][0]), -index))
        yield _batch("logits_all", steps[most], limits, blocks, all_logits=True)
        kept = [index for index in kept if index != most]
    longest = [max(read + before for _, read, before in steps[index][0]) for index in kept]
    shapes = [(int(features[i, 3]), length, int(features[i, 0])) for i, length in zip(kept, longest, strict=True)]
    for name, index in zip(named("mixed", shapes), kept, strict=True):
        yield _batch(name, steps[index], limits, blocks)
    yield from _decode_corners(limits, blocks, counts)


def _decode_corners(limits: Limits, blocks: int, counts: range) -> Iterator[Batch]:
    """Yield the most decode steps, and fewer of longer requests where so many leave no room for a longest one."""
    decodes = [_decoding(limits, blocks, counts[-1])]
    if decodes[0][0][1] < limits.longest_sequence:
        decodes = [_decoding(limits, blocks, count) for count in counts]
    shapes = [(sum(count for count, _ in groups), groups[0][1]) for groups in decodes]
    kept = needed(np.array(shapes, dtype=np.float64))
    names = named("decode", [(*shapes[index], 0) for index in kept], late=True)
    for name, index in zip(names, kept, strict=True):
        yield _batch(name, ([], decodes[index]), limits, blocks)


def chunked_sweep(limits: Limits, weight: int, counts: list[int]) -> Iterator[Batch]:
    """Yield, for each count of requests, a step with chunks and one without."""
    blocks = pool_blocks(limits, weight)
    for count in counts:
        if count * _fewest_blocks(limits.rules.block_size) <= blocks:
            for step in list(_largest_steps(limits, blocks, count))[:1]:
                yield _batch(f"sweep_mixed_{count}", step, limits, blocks)
            yield _batch(f"sweep_decode_{count}", ([], _decoding(limits, blocks, count)), limits, blocks)


def pool_blocks(limits: Limits, weight: int) -> int:
    """Return the blocks of a pool: at the lowest weight those of one longest request."""
    return weight // limits.rules.block_size


def _batch(case: str, step: Step, limits: Limits, blocks: int, *, all_logits: bool = False) -> Batch:
    return Batch(
        case=case,
        prefill=tuple(
            Rows(request_count=count, input_tokens=read, output_tokens=1, context_tokens=before)
            for count, read, before in step[0]
        ),
        decode=tuple(grown(count, length, limits.most_new_tokens) for count, length in step[1]),
        pool_tokens=blocks * limits.rules.block_size,
        all_logits=all_logits,
    )


def _fewest_blocks(size: int) -> int:
    return -(-SHORTEST // size)


def _decoding(limits: Limits, blocks: int, count: int) -> Groups:
    """Return so many requests that are decoded, in so many blocks or fewer, as long ones as may be."""
    size, longest = limits.rules.block_size, limits.longest_sequence
    groups = ragged(count, blocks, _fewest_blocks(size), -(-longest // size))
    return [(requests, min(longest, each * size)) for requests, each in groups]


def _largest_steps(limits: Limits, blocks: int, count: int) -> Iterator[Step]:
    """Yield the largest steps of so many requests: few chunks and else decodes, or inputs that fill the blocks."""
    size = limits.rules.block_size
    limit = blocks * size if limits.prefill_limit is None else limits.prefill_limit
    fewest, each = _fewest_blocks(size), -(-limits.longest_sequence // size)
    # The fewest requests that read all that the decodes leave of the step: each one more is one decode less. They take
    # as many blocks as the longest sequence has, but for the last of them.
    few = -(-(limit - count) // max(1, limits.longest_sequence - SHORTEST))
    if each > fewest:
        few = min(few, (blocks - count * fewest) // (each - fewest) + 1)
    few = min(max(few, 1), count)
    chunks = _chunks(limits, limit - (count - few), blocks - (count - few) * fewest, few)
    decodes = count - sum(requests for requests, _, _ in chunks)
    left = blocks - sum(requests * -(-(read + before + 1) // size) for requests, read, before in chunks)
    if chunks:
        yield chunks, _decoding(limits, left, decodes) if decodes else []
    if sum(requests * read for requests, read, _ in chunks) + decodes < limit:
        filling = _filling(limits, blocks, count, limit)
        if filling:
            yield filling, []


def _chunks(limits: Limits, tokens: int, blocks: int, count: int) -> Chunks:
    """Return whole inputs of the longest, and last a chunk at the end of as long a sequence as there are blocks for."""
    size, longest = limits.rules.block_size, limits.longest_input
    each = -(-limits.longest_sequence // size)
    whole = max(0, min(tokens // longest, blocks // each, count))
    found = [(whole, longest, 0)] if whole else []
    room = min(limits.longest_sequence, (blocks - whole * each) * size)
    rest = min(tokens - whole * longest, room - 1)
    if rest > 0 and whole < count:
        found.append((1, rest, room - 1 - rest))
    return found


def _filling(limits: Limits, blocks: int, count: int, limit: int) -> Chunks:
    """Return so many inputs that leave no block unused; what exceeds the limit of a step was read before it."""
    size, longest = limits.rules.block_size, limits.longest_sequence
    aligned = longest // size
    if not aligned:
        return []
    lengths = [(requests, each * size) for requests, each in ragged(count, blocks, _fewest_blocks(size), aligned)]
    more = min(blocks - count * aligned, count) if longest % size else 0
    if more > 0:
        lengths = [group for group in ((more, longest), (count - more, aligned * size)) if group[0]]
    excess = sum(requests * (length - 1) for requests, length in lengths) - limit
    found: Chunks = []
    for requests, length in lengths:
        found += _shortened(requests, length - 1, max(excess, 0))
        excess -= requests * (length - 2)
    return found


def _shortened(count: int, length: int, excess: int) -> Chunks:
    """Return inputs that read so many tokens less in this step, down to one each."""
    done = min(count, excess // (length - 1)) if length > 1 else 0
    part = min(excess - done * (length - 1), length - 1) if done < count else 0
    groups = [(done, length - 1), (1 if part else 0, part), (count - done - (1 if part else 0), 0)]
    return [(requests, length - before, before) for requests, before in groups if requests]


def _features(step: Step) -> tuple[int, int, int, int]:
    """Return tokens of the step, the scores of all its requests, those of the one with most, and requests."""
    tokens = scores = most = requests = 0
    for count, read, before in step[0]:
        score = read * (before + read)
        tokens += count * read
        scores += count * score
        most = max(most, score)
        requests += count
    for count, length in step[1]:
        tokens += count
        scores += count * length
        most = max(most, length)
        requests += count
    return tokens, scores, most, requests
