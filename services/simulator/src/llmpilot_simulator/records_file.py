"""The records of simulated load tests as a Parquet file, in the schema that load tests write.

Invariant: the columns are those of `record_schema`, after three that say which load test a row belongs to.
"""

from collections.abc import Sequence
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq

from llmpilot_perfmodel.batching.records import RequestRecords

LoadTest = tuple[str, str, int, RequestRecords]
"""LLM, GPU profile, users, records."""


def records_file(tests: Sequence[LoadTest]) -> bytes:
    """Return the content of a Parquet file with the requests of all load tests."""
    content = BytesIO()
    tables = [_table(*test) for test in tests]
    pq.write_table(pa.concat_tables(tables), content, compression="zstd")
    return content.getvalue()


def _table(llm: str, gpu_profile: str, users_count: int, records: RequestRecords) -> pa.Table:
    count = len(records)
    columns = {"llm": [llm] * count, "gpu_profile": [gpu_profile] * count, "users_count": [users_count] * count}
    return pa.table(columns | dict(records.columns()))
