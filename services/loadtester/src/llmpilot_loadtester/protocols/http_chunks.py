"""Walks the chunks of an HTTP/1.1 body without looking into them.

Invariant: a walk that stopped goes on where it stopped, so every chunk header is read once however the bytes come.
Source: RFC 9112, 7.1.
"""

from dataclasses import dataclass

LARGEST_LINE_BYTES = 4096
"""Of a chunk's size with its extensions."""
LARGEST_TRAILER_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkWalk:
    """How far a walk came."""

    starts: list[int]
    """Where the content of each chunk begins; the last may not have come whole."""
    sizes: list[int]
    next_at: int
    """Where the next chunk begins, which may be beyond the data; with `is_ended`, where the body ends."""
    is_ended: bool = False
    problem: str = ""
    """Empty: none so far."""


def walk_chunks(data: bytes, at: int, *, most_count: int = 1 << 62) -> ChunkWalk:
    """Walk from the beginning of a chunk as far as the data go, over no more chunks than that."""
    starts: list[int] = []
    sizes: list[int] = []
    length = len(data)
    find = data.find
    problem = ""
    while at < length and len(starts) < most_count:
        line_end = find(b"\r\n", at, at + LARGEST_LINE_BYTES)
        if line_end < 0:
            problem = "a chunk without a size" if length - at >= LARGEST_LINE_BYTES else ""
            break
        try:
            size = int(data[at:line_end], 16)
        except ValueError:
            size = _size_before_extensions(data[at:line_end])
        if size <= 0:
            if size == 0:
                return _walk_trailers(data, at, line_end, starts, sizes)
            problem = f"a chunk of size {data[at:line_end][:30]!r}"
            break
        end = line_end + 2 + size
        if data[end : end + 2] != b"\r\n" and data[end:] not in (b"", b"\r"):
            problem = "a chunk that is not as long as it says"
            break
        starts.append(line_end + 2)
        sizes.append(size)
        at = end + 2
    return ChunkWalk(starts=starts, sizes=sizes, next_at=at, problem=problem)


def _walk_trailers(data: bytes, at: int, line_end: int, starts: list[int], sizes: list[int]) -> ChunkWalk:
    """The last chunk's line and what follows it end like a head: with an empty line."""
    end = data.find(b"\r\n\r\n", line_end)
    if end >= 0:
        return ChunkWalk(starts=starts, sizes=sizes, next_at=end + 4, is_ended=True)
    problem = "trailers without an end" if len(data) - at > LARGEST_TRAILER_BYTES else ""
    return ChunkWalk(starts=starts, sizes=sizes, next_at=at, problem=problem)


def _size_before_extensions(line: bytes) -> int:
    """Return the size in a chunk's first line; -1: there is none."""
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError:
        return -1
