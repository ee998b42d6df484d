import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_contracts.record_schema import COLUMN_NAMES, problems
from llmpilot_loadtester.domain.records import REQUEST_COLUMNS, RecordBatch, empty_records, joined

Chunks = list[tuple[int, int]]


def batch_of(rows: list[tuple[int, int, Chunks]]) -> RecordBatch:
    """Requests: index, send time, chunks as time after sending and tokens; without chunks they failed."""
    columns = {name: np.zeros(len(rows), np.int64) for name in REQUEST_COLUMNS}
    columns["request_index"] = np.array([index for index, _, _ in rows], np.int64)
    columns["send_nanos"] = np.array([send for _, send, _ in rows], np.int64)
    columns["scheduled_nanos"] = columns["send_nanos"]
    columns["first_byte_nanos"] = np.array(
        [send + chunks[0][0] if chunks else -1 for _, send, chunks in rows], np.int64
    )
    columns["end_nanos"] = np.array([send + (chunks or [(9, 1)])[-1][0] for _, send, chunks in rows], np.int64)
    columns["status"] = np.array([0 if chunks else 5 for _, _, chunks in rows], np.int64)
    return RecordBatch(
        **columns,
        errors=tuple("" if chunks else "gone" for _, _, chunks in rows),
        chunk_starts=np.cumsum([0, *(len(chunks) for _, _, chunks in rows)]).astype(np.int64),
        chunk_nanos=np.array([send + at for _, send, chunks in rows for at, _ in chunks], np.int64),
        chunk_tokens=np.array([tokens for _, _, chunks in rows for _, tokens in chunks], np.int64),
    )


ROWS = [(4, 300, [(10, 1), (20, 2)]), (2, 100, []), (7, 200, [(5, 1)])]

chunk_lists = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 3)), max_size=4).map(sorted)
row_lists = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 10**6), chunk_lists), max_size=6)


def rows_of(batch: RecordBatch) -> list[tuple[int, int, Chunks]]:
    """Back from columns, one request after another."""
    rows = []
    for row in range(len(batch)):
        chunks = slice(batch.chunk_starts[row], batch.chunk_starts[row + 1])
        send = int(batch.send_nanos[row])
        times = (batch.chunk_nanos[chunks] - send).tolist()
        tokens = batch.chunk_tokens[chunks].tolist()
        rows.append((int(batch.request_index[row]), send, list(zip(times, tokens, strict=True))))
    return rows


@given(row_lists, st.data())
def test_taken_requests_keep_their_chunks(rows: list[tuple[int, int, Chunks]], data: st.DataObject) -> None:
    batch = batch_of(rows)
    picks = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8)) if rows else []
    assert rows_of(batch.take(np.array(picks, np.int64))) == [rows[pick] for pick in picks]
    mask = np.array([index % 2 == 0 for index in range(len(rows))], np.bool_)
    assert rows_of(batch.take(mask)) == rows[::2]


@given(st.lists(row_lists, max_size=4))
def test_batches_of_several_workers_join_exactly_in_the_order_of_sending(
    batches: list[list[tuple[int, int, Chunks]]],
) -> None:
    expected = sorted((row for rows in batches for row in rows), key=lambda row: (row[1], row[0]))
    assert rows_of(joined([batch_of(rows) for rows in batches])) == expected


def test_output_tokens_are_those_of_all_chunks() -> None:
    assert batch_of(ROWS).output_tokens.tolist() == [3, 0, 1]
    assert empty_records().output_tokens.tolist() == []


def test_times_become_relative_and_unknown_ones_stay_unknown() -> None:
    batch = batch_of(ROWS).since(60)
    assert batch.send_nanos.tolist() == batch.scheduled_nanos.tolist() == [240, 40, 140]
    assert batch.first_byte_nanos.tolist() == [250, -1, 145]
    assert batch.end_nanos.tolist() == [260, 49, 145]
    assert batch.chunk_nanos.tolist() == [250, 260, 145]


@given(row_lists)
def test_table_satisfies_the_record_schema(rows: list[tuple[int, int, Chunks]]) -> None:
    table = batch_of(rows).table(origin="measured")
    assert tuple(table) == COLUMN_NAMES
    assert problems(table) == []


def test_table_has_words_for_codes_and_nothing_for_what_is_unknown() -> None:
    batch = batch_of(ROWS)
    batch.finish_reason[:] = [1, -1, 0]
    batch.user_index[:] = -1
    batch.input_tokens[:] = [64, -1, 0]
    table = batch.table(origin="measured")
    assert table["status"] == ["ok", "disconnected", "ok"]
    assert table["error"] == ["", "gone", ""]
    assert table["finish_reason"] == ["length", None, "stop"]
    assert table["first_byte_time_nanos"] == [310, None, 205]
    assert table["user_index"] == [None, None, None]
    assert table["input_token_count"] == [64, None, 0]
    assert [list(map(int, times)) for times in table["chunk_time_nanos"]] == [[310, 320], [], [205]]  # type: ignore[call-overload]


def test_joining_nothing_is_empty() -> None:
    assert len(joined([])) == len(joined([empty_records()])) == 0


@pytest.mark.parametrize("rows", [[], ROWS])
def test_ok_is_status_zero(rows: list[tuple[int, int, Chunks]]) -> None:
    assert batch_of(rows).is_ok.tolist() == [bool(chunks) for _, _, chunks in rows]
