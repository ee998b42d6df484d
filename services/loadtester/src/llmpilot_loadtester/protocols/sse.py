"""Server-sent events out of a body.

Invariant: an event ends where the empty line after it ends; what has no empty line after it is an event only where the
body is whole. Time is linear in the size of the body.
Source: the HTML standard, 9.2.6.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from llmpilot_loadtester.protocols.reply import go_on

LARGEST_LINE_BYTES = 16 * 1024 * 1024
_SLAB_BYTES = 128 * 1024
_EMPTY_LINE = re.compile(rb"(?>\r\n|\r|\n)(?>\r\n|\r|\n)")
_LINE_END = re.compile(rb"\r\n|\r|\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Events:
    """The blocks of a stream, those without data included."""

    data: Sequence[bytes]
    """By block; empty: a comment, or nothing."""
    ends: Sequence[int]
    """By block: where it ends in the body, its empty line included."""
    names: Mapping[int, str]
    """Of the blocks that have one other than "message"."""
    problem: str = ""


def cut_events(body: bytes, *, is_whole: bool, pause: Callable[[], None] = go_on) -> Events:
    """Return the events of a body."""
    data: list[bytes] = []
    ends: list[int] = []
    names: dict[int, str] = {}
    problem = ""
    for slab in _slabs(body, is_whole=is_whole):
        if ends:
            pause()
        data += _read_blocks(slab, len(ends), names)
        ends += slab.ends
        if slab.ends[-1] > LARGEST_LINE_BYTES and any(map(_has_large_line, slab.blocks)):
            problem = f"a line of more than {LARGEST_LINE_BYTES:,} bytes"
    return Events(data=data, ends=ends, names=names, problem=problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slab:
    """Some blocks in a row, at least one."""

    blocks: Sequence[bytes]
    ends: Sequence[int]
    are_lines: bool
    """Whether every block is one line, as nearly always; then none need be searched for lines."""


def _slabs(body: bytes, *, is_whole: bool) -> Iterator[_Slab]:
    at = 0
    if b"\r" in body:
        found = list(_EMPTY_LINE.finditer(body))
        ends = [match.end() for match in found]
        if ends:
            blocks = [body[start : match.start()] for start, match in zip([0, *ends], found, strict=False)]
            yield _Slab(blocks=blocks, ends=ends, are_lines=False)
            at = ends[-1]
    else:
        slab_bytes = _SLAB_BYTES
        while at < len(body):
            *blocks, _ = body[at : at + slab_bytes].split(b"\n\n")
            if blocks:
                ends = [at + end + 2 * number for number, end in enumerate(accumulate(map(len, blocks)), 1)]
                are_lines = body.count(b"\n", at, ends[-1]) == 2 * len(blocks)
                yield _Slab(blocks=blocks, ends=ends, are_lines=are_lines)
                at, slab_bytes = ends[-1], _SLAB_BYTES
            elif at + slab_bytes >= len(body):
                break
            else:  # a block larger than that
                slab_bytes *= 2
    if at < len(body) and is_whole:
        yield _Slab(blocks=[body[at:]], ends=[len(body)], are_lines=not _LINE_END.search(body, at))


def _read_blocks(slab: _Slab, first: int, names: dict[int, str]) -> list[bytes]:
    """Return the data of blocks; notes their names. first: how many blocks there were before."""
    if slab.are_lines and all(block.startswith(b"data:") for block in slab.blocks):
        return [block[5:] for block in slab.blocks]
    read = [_read_block(block) for block in slab.blocks]
    names.update({first + index: name for index, (_, name) in enumerate(read) if name not in ("", "message")})
    return [content for content, _ in read]


def _read_block(block: bytes) -> tuple[bytes, str]:
    """Return a block's data and name, as the standard has it."""
    data: list[bytes] = []
    name = b""
    for line in _LINE_END.split(block):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
        elif field == b"error":  # llama.cpp's server has said so, which is not of the standard
            name = field
            data.append(value)
    return b"\n".join(data), name.decode("utf-8", "replace")


def _has_large_line(block: bytes) -> bool:
    return len(block) > LARGEST_LINE_BYTES and any(len(line) > LARGEST_LINE_BYTES for line in _LINE_END.split(block))
