"""From the public raw records to measurements.

Invariant: every file of the source becomes one measurement or is named in the error, and memory holds a few files at
a time.
Source: IBM/LLM-performance-prediction (Lazuka et al., 2024).
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_recommender.aggregation import aggregate
from llmpilot_recommender.measurement import Measurement, Origin, Quantiles
from llmpilot_recommender.published import read_rows
from llmpilot_recommender.raw_records import parse_raw_file
from llmpilot_recommender.raw_source import raw_csvs

_VIOLATIONS_MAX = 50


def import_raw(
    path: Path,
    *,
    published_medians: Path | None = None,
    progress: Callable[[int, int | None], None] = lambda _done, _total: None,
) -> tuple[Measurement, ...]:
    """Return the measurements of all load tests in a folder of CSVs or a tar archive, ordered by their keys.

    `published_medians`, a CSV with the columns model, gpu, num_users, median_nttft, median_itl, fills in the load tests
    whose records are missing. `progress` is called in this thread with the files done and in total (None: not known
    yet); an exception in it, or Ctrl-C, ends the import. Raises InvalidInputError that names the bad files, rows and
    columns, 50 at most.
    """
    medians = _read_medians(published_medians) if published_medians else ()
    sources, file_count = raw_csvs(path)
    violations: list[Violation] = []
    measurements: dict[tuple[str, str, int], Measurement] = {}
    done = 0
    with closing(_measure_all(sources)) as results:
        for name, result in results:
            if isinstance(result, InvalidInputError):
                violations += result.violations
            elif measurements.setdefault(result.key, result) is not result:
                violations.append(Violation(name, f"repeats the load test {result.key}; remove one of the two files"))
            done += 1
            progress(done, file_count)
    if not done:
        violations.append(Violation(str(path), "has no CSV file; give the folder or archive of the raw records"))
    if violations:
        raise InvalidInputError(_capped(violations))
    for median in medians:
        measurements.setdefault(median.key, median)
    return tuple(measurements[key] for key in sorted(measurements))


def _measure_all(
    sources: Iterator[tuple[str, bytes]],
) -> Generator[tuple[str, Measurement | InvalidInputError], None, None]:
    """Aggregate on all cores, in order; the reader is at most two files per core ahead.

    Threads do: pyarrow, numpy and lzma let go of the interpreter lock in all that takes long.
    """
    worker_count = os.cpu_count() or 1
    pool = ThreadPoolExecutor(worker_count, thread_name_prefix="dataset-import")
    waiting: deque[tuple[str, Future[Measurement | InvalidInputError]]] = deque()
    try:
        for name, content in sources:
            waiting.append((name, pool.submit(_measure, name, content)))
            if len(waiting) > 2 * worker_count:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _measure(name: str, content: bytes) -> Measurement | InvalidInputError:
    try:
        return aggregate(parse_raw_file(name, content))
    except InvalidInputError as error:
        return error


def _read_medians(path: Path) -> tuple[Measurement, ...]:
    rows = read_rows(path, nttft_column="median_nttft", itl_column="median_itl", smallest_ms=0)
    return tuple(
        Measurement(
            llm=row.llm,
            gpu_profile=row.gpu_profile,
            users_count=row.users_count,
            origin=Origin.PUBLISHED_MEDIAN,
            nttft=Quantiles(median_ms=row.nttft_ms),
            itl=Quantiles(median_ms=row.itl_ms),
        )
        for row in rows
    )


def _capped(violations: list[Violation]) -> list[Violation]:
    left_out = len(violations) - _VIOLATIONS_MAX
    if left_out <= 0:
        return violations
    return [*violations[:_VIOLATIONS_MAX], Violation("raw data", f"has {left_out} more problems")]
