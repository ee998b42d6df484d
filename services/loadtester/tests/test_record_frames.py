import struct
import zlib
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_loadtester.domain.record_frames import pack_records, unpack_records
from llmpilot_loadtester.domain.records import REQUEST_COLUMNS, RecordBatch, empty_records

NOW = 1_760_000_000_000_000_000
CODED = {"token_count_source": (0, 3), "status": (0, 8), "finish_reason": (-1, 3), "stamp_source": (0, 2)}
WORDS = st.integers(-(2**63), 2**63 - 1) | st.integers(NOW, NOW + 10**12) | st.integers(-1, 1_000)
TEXTS = st.sampled_from(["", "", "connection reset"]) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def batch_of(chunks: list[list[tuple[int, int]]], errors: tuple[str, ...], **columns: list[int]) -> RecordBatch:
    """Chunks of each request: time and tokens."""
    flat = [chunk for request in chunks for chunk in request]
    return RecordBatch(
        **{name: np.array(columns.get(name, [0] * len(chunks)), np.int64) for name in REQUEST_COLUMNS},
        errors=errors,
        chunk_starts=np.cumsum([0, *map(len, chunks)]).astype(np.int64),
        chunk_nanos=np.array([nanos for nanos, _ in flat], np.int64),
        chunk_tokens=np.array([tokens for _, tokens in flat], np.int64),
    )


@st.composite
def batches(draw: st.DrawFn) -> RecordBatch:
    tokens = st.just(1) | st.integers(1, 2**63 - 1)
    chunks = draw(st.lists(st.lists(st.tuples(WORDS, tokens), max_size=6), max_size=6))
    count = len(chunks)
    columns = {
        name: draw(st.lists(st.integers(*CODED[name]) if name in CODED else WORDS, min_size=count, max_size=count))
        for name in REQUEST_COLUMNS
    }
    return batch_of(chunks, tuple(draw(st.lists(TEXTS, min_size=count, max_size=count))), **columns)


def assert_same(batch: RecordBatch, other: RecordBatch) -> None:
    for field in fields(RecordBatch):
        value, expected = getattr(batch, field.name), getattr(other, field.name)
        if field.name == "errors":
            assert value == expected
        else:
            assert value.dtype == np.int64, field.name
            assert value.tolist() == expected.tolist(), field.name


def streams(request_count: int, token_count: int, *, deviation_nanos: float, tokens_per_chunk: int = 1) -> RecordBatch:
    """Requests as a load of 10 ms gaps gives them."""
    random = np.random.default_rng(7)
    sends = [NOW + index * 1_000_000 for index in range(request_count)]
    gaps = 10_000_000 + random.normal(0, deviation_nanos, (request_count, token_count)).astype(np.int64)
    times = np.array(sends)[:, None] + 40_000_000 + np.cumsum(gaps, axis=1)
    return batch_of(
        [[(nanos, tokens_per_chunk) for nanos in row] for row in times.tolist()],
        ("",) * request_count,
        request_index=list(range(request_count)),
        user_index=[index % 128 for index in range(request_count)],
        send_nanos=sends,
        scheduled_nanos=sends,
        first_byte_nanos=times[:, 0].tolist(),
        end_nanos=(times[:, -1] + 30_000).tolist(),
        input_tokens=[500] * request_count,
        reasoning_tokens=[-1] * request_count,
    )


@given(batches())
def test_any_batch_comes_back(batch: RecordBatch) -> None:
    assert_same(unpack_records(pack_records(batch)), batch)


def test_batch_without_requests_comes_back() -> None:
    assert_same(unpack_records(pack_records(empty_records())), empty_records())


def test_batch_of_more_numbers_than_a_block_comes_back() -> None:
    batch = streams(500, 100, deviation_nanos=1e6)
    assert_same(unpack_records(pack_records(batch)), batch)


def test_frame_is_as_documented() -> None:
    """By hand, from the table in the module's docstring; zigzag: 0, -1, 1, -2 are 0, 1, 2, 3."""
    batch = batch_of(
        [[(1_010, 2), (1_012, 1), (1_016, 1)], []],
        ("", "é"),
        request_index=[3, 4],
        user_index=[-1, 1],
        send_nanos=[1_000, 1_001],
        scheduled_nanos=[1_000, 1_000],
        first_byte_nanos=[1_010, -1],
        end_nanos=[1_020, 1_031],
        input_tokens=[64, -1],
        reasoning_tokens=[-1, -1],
        token_count_source=[1, 0],
        status=[0, 5],
        finish_reason=[1, -1],
        stamp_source=[0, 1],
    )
    numbers = [
        *[[6, 2], [1, 4], [0, 2], [0, 2], [20, 0xD3, 0x0F], [40, 60], [0x80, 1, 1], [1, 1]],
        *[[2, 0], [0, 10], [2, 1], [0, 2], [6, 0], [3, 0], [0, 1]],
        *[[0, 1, 2], [1, 2], [1, 0], [2]],
    ]
    content = bytes(number for column in numbers for number in column)
    after_checksum = struct.pack("<qIIIII", 1_000, 2, 3, 2, 1, len(content)) + content + "é".encode()
    expected = b"LPR1" + struct.pack("<I", zlib.crc32(after_checksum)) + after_checksum
    assert pack_records(batch) == expected


@pytest.mark.parametrize(
    ("deviation_nanos", "most_bytes"),
    [
        # deviations within 8,192 ns take 2 bytes: four standard deviations; a request adds some 35 bytes to its tokens
        (2e3, 2.5),
        (5e4, 3.5),
        # zigzag of |x| < 2^27 = 134 ms takes 4 bytes
        (1e6, 4.0),
    ],
)
def test_token_takes_at_most_four_bytes(deviation_nanos: float, most_bytes: float) -> None:
    batch = streams(50, 100, deviation_nanos=deviation_nanos)
    assert len(pack_records(batch)) / 5_000 <= most_bytes


def test_chunks_of_one_size_cost_nothing_more() -> None:
    one = pack_records(streams(50, 100, deviation_nanos=5e4))
    four = pack_records(streams(50, 100, deviation_nanos=5e4, tokens_per_chunk=4))
    assert len(four) == len(one)


def test_text_that_is_no_unicode_is_kept_as_far_as_it_is() -> None:
    batch = batch_of([[]], ("bad \ud800 text",), status=[5])
    assert unpack_records(pack_records(batch)).errors == ("bad ? text",)


SMALL = pack_records(
    batch_of(
        [[(NOW + 9, 1), (NOW + 20, 3)], [], [(NOW + 30, 1)]], ("", "gone", ""), send_nanos=[NOW] * 3, status=[0, 5, 0]
    )
)


def sealed(data: bytes) -> bytes:
    """The same with a checksum that fits, so that what comes after it is reached."""
    return data[:4] + struct.pack("<I", zlib.crc32(data[8:])) + data[8:]


@pytest.mark.parametrize("size", range(len(SMALL)))
def test_frame_cut_anywhere_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="record frame: "):
        unpack_records(SMALL[:size])
    with pytest.raises(ValueError, match="record frame: "):
        unpack_records(sealed(SMALL[:size]))


@pytest.mark.parametrize("at", range(len(SMALL)))
def test_any_damage_is_noticed(at: int) -> None:
    for bit in range(8):
        damaged = bytearray(SMALL)
        damaged[at] ^= 1 << bit
        with pytest.raises(ValueError, match="record frame: "):
            unpack_records(bytes(damaged))


def refused_or_whole(data: bytes) -> None:
    try:
        batch = unpack_records(data)
    except ValueError:
        return
    assert len(batch.chunk_nanos) == len(batch.chunk_tokens) == batch.chunk_starts[-1]
    assert (np.diff(batch.chunk_starts) >= 0).all()
    assert (batch.chunk_tokens >= 1).all()
    for name, (low, high) in CODED.items():
        values = getattr(batch, name)
        assert ((values >= low) & (values <= high)).all()
    # that later code gets by with it, too
    batch.take(np.arange(len(batch))).table(origin="measured")
    assert len(batch) + len(batch.chunk_nanos) <= len(data)


@given(st.lists(st.tuples(st.integers(8, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_what_fits_its_checksum_and_is_wrong_is_refused_or_whole(changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(SMALL)
    for at, value in changes:
        damaged[at] = value
    refused_or_whole(sealed(bytes(damaged)))


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="record frame: "):
        unpack_records(data)


@pytest.mark.parametrize("field", range(5))
def test_huge_counts_take_no_memory(field: int) -> None:
    """2^32 - 1 of anything: refused before anything of that size is made, or this test would be killed."""
    damaged = bytearray(SMALL)
    damaged[16 + 4 * field : 20 + 4 * field] = b"\xff" * 4
    with pytest.raises(ValueError, match="do not fit"):
        unpack_records(sealed(bytes(damaged)))


def frame(numbers: list[list[int]], counts: tuple[int, int, int, int]) -> bytes:
    content = bytes(number for column in numbers for number in column)
    return sealed(b"LPR1" + b"0000" + struct.pack("<qIIIII", 0, *counts, len(content)) + content)


REQUEST = [[0]] * 13
HUGE = [0xFF] * 9 + [0x01]


@pytest.mark.parametrize(
    ("numbers", "counts", "message"),
    [
        ([*REQUEST, [2], [0], [0], [1], [0]], (1, 1, 1, 0), "a request has 2 of 1 chunks"),
        ([*REQUEST, [0], [0], [0], [1], [0]], (1, 1, 1, 0), "requests have 0 of 1 chunks"),
        ([*REQUEST, [1], [1], [0], [1], [0]], (1, 1, 1, 0), "names error text 1 of 0"),
        ([*REQUEST, [1], [0], [0], HUGE, [0]], (1, 1, 1, 0), "a run has 18446744073709551615 of 1 chunks"),
        ([*REQUEST, [1], [0], [0], [0], [0]], (1, 1, 1, 0), "runs have 0 of 1 chunks"),
        ([*REQUEST, [1], [0], [0], [1], HUGE], (1, 1, 1, 0), "a chunk has 0 tokens"),
        ([*REQUEST, [0], [0], HUGE], (1, 0, 0, 1), "error texts have 0 bytes and say otherwise"),
        ([*REQUEST[:9], [18], *REQUEST[10:], [0], [0]], (1, 0, 0, 0), "status must be from 0 to 8, is 9 to 9"),
        ([*REQUEST, [0], [0], [0]], (1, 0, 0, 0), "must hold 15 numbers, holds 16"),
        ([*REQUEST, [0], [0x80]], (1, 0, 0, 0), "must hold 15 numbers, holds 14"),
        ([*REQUEST, [0], [0xFF] * 9 + [0x02]], (1, 0, 0, 0), "more than 64 bits"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    numbers: list[list[int]], counts: tuple[int, int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_records(frame(numbers, counts))
