"""Server-sent events out of a body.

Invariant: an event ends where the empty line after it ends; what has no empty line after it is an event only where the
body is whole. Time is linear in the size of the body.
Source: the HTML standard, 9.2.6.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

LARGEST_LINE_BYTES = 16 * 1024 * 1024
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


def cut_events(body: bytes, *, is_whole: bool) -> Events:
    """Return the events of a body."""
    if b"\r" in body:
        found = list(_EMPTY_LINE.finditer(body))
        ends = [match.end() for match in found]
        blocks = [body[start : match.start()] for start, match in zip([0, *ends], found, strict=False)]
        rest = body[ends[-1] :] if ends else body
        are_lines = False
    else:
        *blocks, rest = body.split(b"\n\n")
        ends = [end + 2 * number for number, end in enumerate(accumulate(map(len, blocks)), 1)]
        are_lines = body.count(b"\n") == 2 * len(blocks)
    if rest and is_whole:
        blocks.append(rest)
        ends.append(len(body))
    return _read_blocks(blocks, ends, are_lines=are_lines)


def _read_blocks(blocks: Sequence[bytes], ends: Sequence[int], *, are_lines: bool) -> Events:
    """are_lines: whether every block is one line, as nearly always; then none need be searched for lines."""
    names: dict[int, str] = {}
    if are_lines and all(block.startswith(b"data:") for block in blocks):
        data = [block[5:] for block in blocks]
    else:
        read = [_read_block(block) for block in blocks]
        data = [content for content, _ in read]
        names = {index: name for index, (_, name) in enumerate(read) if name not in ("", "message")}
    problem = ""
    if ends and ends[-1] > LARGEST_LINE_BYTES and any(map(_has_large_line, blocks)):
        problem = f"a line of more than {LARGEST_LINE_BYTES:,} bytes"
    return Events(data=data, ends=ends, names=names, problem=problem)


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
