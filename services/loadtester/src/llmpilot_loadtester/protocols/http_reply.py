"""A reply over HTTP/1.1 after the fact: its head, its body in one piece, and which part brought each byte of it.

Invariant: the body and all that is said of it depend on the bytes alone; only `parts_of` knows how they were cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from llmpilot_loadtester.protocols.http_chunks import ChunkWalk, walk_chunks
from llmpilot_loadtester.protocols.http_head import BadHeadError, Head, read_head
from llmpilot_loadtester.protocols.reply import STEP_COUNT, Received

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpReply:
    """What came of a reply."""

    head: Head | None
    """None: it did not come whole, or was none."""
    body: bytes = b""
    """Without the framing."""
    is_whole: bool = False
    keeps_connection: bool = False
    problem: str = ""
    """How the framing is wrong; empty: it is not."""
    content_starts: Sequence[int] = (0,)
    """Where pieces of the body begin among the received bytes."""
    body_starts: Sequence[int] = (0,)
    """Where they begin in the body."""
    part_ends: Sequence[int] = ()
    """Where the parts end among the received bytes."""

    def parts_of(self, ends: Sequence[int]) -> Integers:
        """Return the index of the part that brought the last byte before each of these places in the body."""
        last = np.asarray(ends, dtype=np.int64) - 1
        body_starts = np.asarray(self.body_starts, dtype=np.int64)
        piece = np.searchsorted(body_starts, last, side="right") - 1
        received = np.asarray(self.content_starts, dtype=np.int64)[piece] + last - body_starts[piece]
        return np.searchsorted(np.asarray(self.part_ends, dtype=np.int64), received, side="right").astype(np.int64)


def read_http(received: Received) -> HttpReply:
    """Take a reply apart."""
    data = b"".join(received.parts)
    try:
        head = read_head(data)
    except BadHeadError as error:
        return HttpReply(head=None, problem=str(error))
    if head is None:
        return HttpReply(head=None)
    part_ends = list(accumulate(map(len, received.parts)))
    if head.is_chunked:
        return _read_chunked(head, data, part_ends, received.pause)
    start = head.size_bytes
    is_endless = head.body_bytes is None
    end = len(data) if head.body_bytes is None else start + head.body_bytes
    return HttpReply(
        head=head,
        body=data[start:end],
        is_whole=received.is_closed if is_endless else len(data) >= end,
        keeps_connection=head.keeps_connection and len(data) == end,
        content_starts=(start,),
        part_ends=part_ends,
    )


def _read_chunked(head: Head, data: bytes, part_ends: Sequence[int], pause: Callable[[], None]) -> HttpReply:
    starts: list[int] = []
    sizes: list[int] = []
    pieces: list[bytes] = []
    walk = ChunkWalk(starts=[], sizes=[], next_at=head.size_bytes)
    while True:
        walk = walk_chunks(data, walk.next_at, most_count=STEP_COUNT)
        starts += walk.starts
        sizes += walk.sizes
        pieces += [data[start : start + size] for start, size in zip(walk.starts, walk.sizes, strict=True)]
        if len(walk.starts) < STEP_COUNT:
            break
        pause()
    return HttpReply(
        head=head,
        body=b"".join(pieces),
        is_whole=walk.is_ended,
        keeps_connection=walk.is_ended and head.keeps_connection and walk.next_at == len(data),
        problem=walk.problem,
        content_starts=starts or (0,),
        body_starts=[0, *accumulate(sizes[:-1])],
        part_ends=part_ends,
    )
