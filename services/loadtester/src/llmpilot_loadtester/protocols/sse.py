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
        blocks = [
            body[start : match.start()] for start, match in zip([0, *ends], found, strict=False)
        ]
        rest = body[ends[-1] :] if ends else body
    else:
        *blocks, rest = body.split(b"\n\n")
        ends = [end + 2 * number for number, end in enumerate(accumulate(map(len, blocks)), 1)]
    if rest and is_whole:
        blocks.append(rest)
        ends.append(len(body))
    return _read_blocks(blocks, ends)


def _read_blocks(blocks: Sequence[bytes], ends: Sequence[int]) -> Events:
    names: dict[int, str] = {}
    data = [
        block[5:] if block.startswith(b"data:") and b"\n" not in block and b"\r" not in block else b"\n"
        for block in blocks
    ]
    if b"\n" in data:
        for index, block in enumerate(blocks):
            if data[index] == b"\n":
                data[index], name = _read_block(block)
                if name not in ("", "message"):
                    names[index] = name
    problem = ""
    if any(len(block) > LARGEST_LINE_BYTES for block in blocks) and any(
        len(line) > LARGEST_LINE_BYTES for block in blocks for line in _LINE_END.split(block)
    ):
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
    return b"\n".join(data), name.decode("utf-8", "replace")
