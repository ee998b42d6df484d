"""Records of requests as bytes: what workers send to the supervisor, what travels on NATS, what a log of a test keeps.

Invariant: what `pack_records` wrote, `unpack_records` returns exactly; anything else is a ValueError, found before
more memory is taken than a few times the bytes that came.

A frame is, all little-endian:

    offset  bytes  what
         0      4  "LPR1", the version of the format
         4      4  CRC-32 (zlib's) of all that follows
         8      8  B, base time: send_nanos of the first request, signed; 0 if there is none
        16      4  n, requests
        20      4  m, chunks
        24      4  r, runs of chunks with the same number of tokens
        28      4  e, different error texts
        32      4  v, bytes of the numbers
        36      v  numbers, as varints (seven bits a byte, lowest first, top bit: more follow), signed ones in zigzag
    36 + v         the e error texts in UTF-8, one after another, to the end of the frame

The numbers are these, column by column. "Step" is a value minus that of the request before, of the first minus 0.
All arithmetic is modulo 2^64, so that any 64-bit value comes back.

    count  column                signed  value
        n  request_index         yes     step
        n  user_index            yes     step
        n  send_nanos            yes     step, B taken off each
        n  scheduled_nanos       yes     send_nanos - scheduled_nanos
        n  first_byte_nanos      yes     first_byte_nanos - send_nanos
        n  end_nanos             yes     end_nanos - send_nanos
        n  input_tokens          yes     as it is
        n  reasoning_tokens      yes     as it is
        n  token_count_source    yes     as it is
        n  status                yes     as it is
        n  finish_reason         yes     as it is
        n  stamp_source          yes     as it is
        n  mean gap G            yes     (last chunk - first chunk) // (chunks - 1) of the request; 0 for 0 or 1 chunks
        n  chunk count           no      chunks of the request; they add up to m
        n  error                 no      0: none, else the position of its text, from 1
        m  chunk_nanos           yes     of a request's first chunk: minus first_byte_nanos; of others: minus the chunk
                                         before, minus G
        r  run lengths           no      chunks in a row with the same number of tokens; they add up to m
        r  run tokens            no      that number minus 1
        e  lengths               no      bytes of each error text

So a token costs what its gap deviates from the request's mean gap: 2 bytes within 8 us, 3 within 1 ms, 4 within 134 ms;
chunks of one token each cost nothing more.
"""

import struct
import zlib

import numpy as np

from llmpilot_contracts.record_schema import FINISH_REASONS, STAMP_SOURCES, STATUSES, TOKEN_COUNT_SOURCES
from llmpilot_loadtester.domain.records import UNKNOWN, Integers, RecordBatch
from llmpilot_loadtester.domain.varints import Words, decode, encode, from_zigzag, to_zigzag

MAGIC = b"LPR1"
_START = struct.Struct("<4sI")
_COUNTS = struct.Struct("<qIIIII")
_PREFIX_BYTES = _START.size + _COUNTS.size
_SIGNED_COLUMNS = 13
_UNSIGNED_COLUMNS = 2
_CODES = (
    ("token_count_source", len(TOKEN_COUNT_SOURCES), 0),
    ("status", len(STATUSES), 0),
    ("finish_reason", len(FINISH_REASONS), UNKNOWN),
    ("stamp_source", len(STAMP_SOURCES), 0),
)


def pack_records(batch: RecordBatch) -> bytes:
    """Return the bytes of a batch; a text that is no Unicode keeps "?" in the places of what is not."""
    base_nanos = int(batch.send_nanos[0]) if len(batch) else 0
    runs, run_tokens = _runs(batch.chunk_tokens)
    codes, texts = _error_codes(batch.errors)
    chunk_counts = np.diff(batch.chunk_starts)
    mean_gaps = _mean_gaps(batch, chunk_counts)
    signed = np.concatenate(
        [
            _steps(batch.request_index),
            _steps(batch.user_index),
            _steps(batch.send_nanos - base_nanos),
            batch.send_nanos - batch.scheduled_nanos,
            batch.first_byte_nanos - batch.send_nanos,
            batch.end_nanos - batch.send_nanos,
            batch.input_tokens,
            batch.reasoning_tokens,
            batch.token_count_source,
            batch.status,
            batch.finish_reason,
            batch.stamp_source,
            mean_gaps,
            _deviations(batch, chunk_counts, mean_gaps),
        ]
    )
    zigzag = to_zigzag(signed)
    unsigned = np.concatenate([chunk_counts, codes]).view(np.uint64)
    last = np.concatenate([runs, run_tokens, np.array([len(text) for text in texts], np.int64)]).view(np.uint64)
    cut = _SIGNED_COLUMNS * len(batch)
    numbers = encode(np.concatenate([zigzag[:cut], unsigned, zigzag[cut:], last]))
    sizes = (len(batch), len(batch.chunk_nanos), len(runs), len(texts), len(numbers))
    content = b"".join([_COUNTS.pack(base_nanos, *sizes), numbers, *texts])
    return _START.pack(MAGIC, zlib.crc32(content)) + content


def _steps(values: Integers) -> Integers:
    return np.diff(values, prepend=np.int64(0))


def _mean_gaps(batch: RecordBatch, chunk_counts: Integers) -> Integers:
    """Return the mean gap of each request's chunks, rounded down."""
    mean_gaps = np.zeros(len(batch), np.int64)
    (several,) = np.nonzero(chunk_counts > 1)
    firsts, lasts = batch.chunk_starts[several], batch.chunk_starts[several + 1] - 1
    mean_gaps[several] = (batch.chunk_nanos[lasts] - batch.chunk_nanos[firsts]) // (chunk_counts[several] - 1)
    return mean_gaps


def _deviations(batch: RecordBatch, chunk_counts: Integers, mean_gaps: Integers) -> Integers:
    """Return by chunk what it is later than expected from the one before."""
    deviations = np.diff(batch.chunk_nanos, prepend=np.int64(0)) - np.repeat(mean_gaps, chunk_counts)
    (some,) = np.nonzero(chunk_counts)
    firsts = batch.chunk_starts[some]
    deviations[firsts] = batch.chunk_nanos[firsts] - batch.first_byte_nanos[some]
    return deviations


def _runs(tokens: Integers) -> tuple[Integers, Integers]:
    """Return how many chunks in a row have the same number of tokens, and that number minus 1."""
    starts = np.flatnonzero(np.concatenate([tokens[:1] == tokens[:1], tokens[1:] != tokens[:-1]]))
    return np.diff(starts, append=len(tokens)), tokens[starts] - 1


def _error_codes(errors: tuple[str, ...]) -> tuple[Integers, list[bytes]]:
    """Return the position of each request's error text, from 1, and the texts."""
    if not any(errors):
        return np.zeros(len(errors), np.int64), []
    positions: dict[str, int] = {"": 0}
    codes = np.array([positions.setdefault(error, len(positions)) for error in errors], np.int64)
    return codes, [error.encode("utf-8", "replace") for error in list(positions)[1:]]


def unpack_records(data: bytes) -> RecordBatch:
    """Return the batch that was packed; ValueError: these bytes are not one."""
    try:
        return _unpacked(data)
    except ValueError as error:
        raise ValueError(f"record frame: {error}") from error


def _unpacked(data: bytes) -> RecordBatch:
    if len(data) < _PREFIX_BYTES:
        raise ValueError(f"{len(data)} bytes are less than its header")
    magic, checksum = _START.unpack_from(data)
    if magic != MAGIC:
        raise ValueError(f"begins with {magic!r}, not {MAGIC!r}")
    if zlib.crc32(memoryview(data)[_START.size :]) != checksum:
        raise ValueError("is damaged or not whole: its checksum does not fit")
    base_nanos, n, m, run_count, text_count, size = _COUNTS.unpack_from(data, _START.size)
    columns = _SIGNED_COLUMNS + _UNSIGNED_COLUMNS
    expected = columns * n + m + 2 * run_count + text_count
    if expected > size or size > len(data) - _PREFIX_BYTES:
        raise ValueError(f"{expected} numbers do not fit into {size} of {len(data)} bytes")
    numbers = decode(data[_PREFIX_BYTES : _PREFIX_BYTES + size], expected)
    ends = np.cumsum([columns * n, m, run_count, run_count])
    by_request, deviations, runs, run_tokens, lengths = np.split(numbers, ends)
    texts = _texts(data[_PREFIX_BYTES + size :], lengths)
    return _batch(
        by_request.reshape(columns, n),
        base_nanos=base_nanos,
        deviations=from_zigzag(deviations),
        chunk_tokens=_run_values(runs, run_tokens, m),
        texts=texts,
    )


def _batch(
    columns: Words, *, base_nanos: int, deviations: Integers, chunk_tokens: Integers, texts: list[str]
) -> RecordBatch:
    signed = from_zigzag(columns[:_SIGNED_COLUMNS])
    send_nanos = np.cumsum(signed[2]) + base_nanos
    first_byte_nanos = signed[4] + send_nanos
    chunk_starts = _chunk_starts(columns[_SIGNED_COLUMNS], len(deviations))
    codes = columns[_SIGNED_COLUMNS + 1]
    if len(codes) and codes.max() > len(texts):
        raise ValueError(f"names error text {codes.max()} of {len(texts)}")
    names = ["", *texts]
    batch = RecordBatch(
        request_index=np.cumsum(signed[0]),
        user_index=np.cumsum(signed[1]),
        scheduled_nanos=send_nanos - signed[3],
        send_nanos=send_nanos,
        first_byte_nanos=first_byte_nanos,
        end_nanos=signed[5] + send_nanos,
        input_tokens=signed[6],
        reasoning_tokens=signed[7],
        token_count_source=signed[8],
        status=signed[9],
        finish_reason=signed[10],
        stamp_source=signed[11],
        errors=tuple(names[code] for code in codes.tolist()),
        chunk_starts=chunk_starts,
        chunk_nanos=_chunk_nanos(deviations, chunk_starts, first_byte_nanos, signed[12]),
        chunk_tokens=chunk_tokens,
    )
    _check_codes(batch)
    return batch


def _chunk_starts(counts: Words, chunk_count: int) -> Integers:
    """Return where each request's chunks begin."""
    if len(counts) and counts.max() > chunk_count:
        raise ValueError(f"a request has {counts.max()} of {chunk_count} chunks")
    starts = np.concatenate([[0], np.cumsum(counts.view(np.int64))]).astype(np.int64)
    if starts[-1] != chunk_count:
        raise ValueError(f"requests have {starts[-1]} of {chunk_count} chunks")
    return starts


def _chunk_nanos(deviations: Integers, starts: Integers, first_byte_nanos: Integers, mean_gaps: Integers) -> Integers:
    """Add up gaps within each request, from its first byte on."""
    counts = np.diff(starts)
    (some,) = np.nonzero(counts)
    firsts = starts[some]
    gaps = deviations + np.repeat(mean_gaps, counts)
    gaps[firsts] = 0
    elapsed = np.cumsum(gaps)
    return elapsed + np.repeat(deviations[firsts] + first_byte_nanos[some] - elapsed[firsts], counts[some])


def _run_values(runs: Words, values: Words, chunk_count: int) -> Integers:
    """Return the number of tokens of each chunk."""
    if len(runs) and runs.max() > chunk_count:
        raise ValueError(f"a run has {runs.max()} of {chunk_count} chunks")
    if int(runs.sum()) != chunk_count:
        raise ValueError(f"runs have {runs.sum()} of {chunk_count} chunks")
    tokens = np.repeat(values.view(np.int64), runs.view(np.int64)) + 1
    if len(tokens) and tokens.min() < 1:
        raise ValueError(f"a chunk has {tokens.min()} tokens")
    return tokens


def _texts(content: bytes, lengths: Words) -> list[str]:
    """Cut the error texts."""
    if (len(lengths) and lengths.max() > len(content)) or int(lengths.sum()) != len(content):
        raise ValueError(f"error texts have {len(content)} bytes and say otherwise")
    ends = np.cumsum(lengths).tolist()
    return [content[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]


def _check_codes(batch: RecordBatch) -> None:
    for name, count, least in _CODES:
        values = getattr(batch, name)
        if len(values) and not (least <= values.min() and values.max() < count):
            raise ValueError(f"{name} must be from {least} to {count - 1}, is {values.min()} to {values.max()}")
