"""Times the fit of a workload model to 17.3 million requests of seven parameters against group-bys of polars.

    python benchmarks/workload_fit.py [--rows N] [--partitions N]

The requests are drawn from the cells of the published fmperf model, the values inside a bin uniformly from its range,
and written as one Parquet file, with pyarrow's defaults, to a temporary folder. Polars gets the bins, finds those of
each value and counts the rows of each combination, streaming: with `cut`, which suits every column, and with a table
for whole numbers, which only suits small ones. We count the cells of the same bins (`--edges`), which is the same work
but for the sketches of the parameters, and as a user fits, with bins of our own choice: that reads the file twice.
Then all get the same file as several partitions. Each runs in a fresh process, interpreter and imports included; all
must find the same number of cells.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROW_COUNT = 17_300_000
BATCH_ROWS = 1 << 20
PARTITION_COUNT = 10
DATA = Path(os.environ.get("LLMPILOT_DATA", Path(__file__).parents[2] / "shared" / "data"))
FMPERF = DATA / "fmperf" / "all_nbins_64.pkl"
MEGABYTE = 1 << 20
METHODS = ("polars with cut", "polars with tables", "fit to edges", "fit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What one process took."""

    wall_seconds: float
    cpu_seconds: float
    peak_mb: float
    request_count: int
    cell_count: int


def write_requests(folder: Path, row_count: int) -> Path:
    """Write requests drawn from the fmperf model to a Parquet file, with the narrowest types that hold them."""
    import pyarrow as pa  # noqa: PLC0415 the other processes do not pay for it
    import pyarrow.parquet as pq  # noqa: PLC0415

    from llmpilot_workload_generator.imports.model_import import import_model  # noqa: PLC0415
    from llmpilot_workload_generator.model import Kind  # noqa: PLC0415

    model = import_model(FMPERF)
    types = {
        "output_tokens": pa.int16(),
        "input_tokens": pa.int16(),
        "top_k": pa.int8(),
        "batch_size": pa.int8(),
        "is_greedy": pa.bool_(),
    }
    schema = pa.schema([(name, types.get(name, pa.float64())) for name in model.names])
    generator = np.random.default_rng(0)
    ends = np.cumsum(model.counts)
    path = folder / "requests.parquet"
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, row_count, BATCH_ROWS):
            draws = generator.integers(ends[-1], size=min(BATCH_ROWS, row_count - start))
            cells = np.searchsorted(ends, draws, side="right")
            columns = []
            for parameter, codes in zip(model.parameters, model.codes[:, cells], strict=True):
                steps = 100 if parameter.kind is Kind.NUMBER else 1
                lows, highs = np.rint(parameter.lows[codes] * steps), np.rint(parameter.highs[codes] * steps)
                drawn = lows + np.floor(generator.random(len(codes)) * (highs - lows + 1))
                columns.append(pa.array(drawn / steps).cast(schema.field(parameter.name).type))
            writer.write_table(pa.table(columns, schema=schema))
    return path


def run_fit(path: Path, edges: Path | None) -> tuple[int, int]:
    """Fit a model as the command does; return how many requests and cells it has."""
    from llmpilot_workload_generator.files.edges_file import read_edges, write_edges  # noqa: PLC0415
    from llmpilot_workload_generator.fitting.fit import FitOptions, fit  # noqa: PLC0415
    from llmpilot_workload_generator.traces.reader import open_trace  # noqa: PLC0415

    options = FitOptions(edges=read_edges(edges) if edges is not None else None)
    model = fit(open_trace(path), options)
    if edges is None and not path.is_dir():
        write_edges(path.with_suffix(".json"), tuple(parameter.bins for parameter in model.parameters))
    return model.request_count, len(model.keys)


def run_polars(path: Path, edges: Path, *, with_tables: bool) -> tuple[int, int]:
    """Count the rows of each combination of bins."""
    import polars as pl  # noqa: PLC0415 the other processes do not pay for it

    expressions = []
    for parameter in json.loads(edges.read_text())["parameters"]:
        name, starts = parameter["name"], np.array(parameter["edges"], np.float64)
        column = pl.col(name)
        if parameter["kind"] == "integer" and (with_tables or name == "is_greedy"):
            table = np.maximum(np.searchsorted(starts, np.arange(1 << 13), side="right") - 1, 0).astype(np.uint8)
            expression = pl.lit(pl.Series(table)).gather(column.cast(pl.UInt32))
        else:
            expression = column.cut(starts[1:].tolist(), left_closed=True).to_physical().cast(pl.UInt8)
        expressions.append(expression.alias(name))
    names = [expression.meta.output_name() for expression in expressions]
    files = path / "*.parquet" if path.is_dir() else path
    cells = pl.scan_parquet(files).select(expressions).group_by(names).len().collect(engine="streaming")
    return int(cells["len"].sum()), cells.height


def run_method(method: str, path: Path, edges: Path) -> tuple[int, int]:
    """Run one of the methods."""
    if method == "fit":
        return run_fit(path, None)
    if method == "fit to edges":
        return run_fit(path, edges)
    return run_polars(path, edges, with_tables=method == "polars with tables")


def in_fresh_process(method: str, path: Path, edges: Path) -> Timing:
    """Run one method in a process of its own, and time all of it."""
    command = [sys.executable, "-W", "ignore", __file__, "--method", method, str(path), str(edges)]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        found, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Timing(wall_seconds=time.perf_counter() - started, **json.loads(found))


def print_row(label: str, timing: Timing) -> None:
    """Print a line of the table."""
    rate = timing.request_count / timing.cpu_seconds / 1e6
    print(
        f"{label:19}{timing.request_count / 1e6:10.1f}{timing.wall_seconds:8.2f}{timing.cpu_seconds:8.2f}"
        f"{rate:15.1f}{timing.peak_mb:9.0f}{timing.cell_count:10,}",
        flush=True,
    )


def report(row_count: int, partition_count: int) -> None:
    """Make the requests, run everything and print the table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = write_requests(folder, row_count)
        edges = path.with_suffix(".json")
        partitions = folder / "partitions"
        partitions.mkdir()
        for number in range(partition_count):
            (partitions / f"{number:03}.parquet").hardlink_to(path)
        in_fresh_process("fit", path, edges)  # compiles the kernels where nobody has, and writes the edges
        print(
            f"{path.stat().st_size / MEGABYTE:.0f} MB of Parquet; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
        )
        print(f"{'':19}{'10^6 rows':>10}{'wall s':>8}{'CPU s':>8}{'10^6/s of CPU':>15}{'peak MB':>9}{'cells':>10}")
        cell_counts = set()
        for trace in (path, partitions):
            for method in METHODS:
                timing = in_fresh_process(method, trace, edges)
                cell_counts.add(timing.cell_count)
                print_row(method, timing)
    if len(cell_counts) > 1:
        raise SystemExit("not all found the same cells")


def main() -> None:
    """Report, or be one of the fresh processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROW_COUNT)
    parser.add_argument("--partitions", type=int, default=PARTITION_COUNT)
    parser.add_argument("--method", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.method:
        report(arguments.rows, arguments.partitions)
        return
    method, path, edges = arguments.method
    request_count, cell_count = run_method(method, Path(path), Path(edges))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found = {
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1024,
        "request_count": request_count,
        "cell_count": cell_count,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
