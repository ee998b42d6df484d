"""Sampled requests as a file or on the terminal, in batches, so that any number of them fits in memory.

Invariant: a file is there whole or not at all.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_servicekit.file_output import written_whole
from llmpilot_servicekit.progress import shown_progress
from llmpilot_workload_generator.prompts.corpus import read_corpus
from llmpilot_workload_generator.prompts.rendering import RenderedRequest, Renderer, RenderOptions
from llmpilot_workload_generator.prompts.request_bodies import Server
from llmpilot_workload_generator.prompts.tokenizer import read_tokenizer
from llmpilot_workload_generator.sampling.sampler import Sample, Sampler

SUFFIXES = (".csv", ".jsonl", ".parquet")
BATCH_REQUESTS = 65_536
BATCH_PROMPTS = 1_024


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """How prompts are made."""

    seed: int
    tokenizer: Path | None
    corpus: Path | None
    shared_prefix_ratio: float
    prefix_group_count: int
    server: str | None
    served_model: str


class _Writer(Protocol):
    def write(self, table: pa.Table) -> None: ...
    def close(self) -> None: ...


def violations(out: Path | None, *, prompts: bool) -> list[Violation]:
    """Say what is wrong with the name of an output file."""
    allowed = (".jsonl",) if prompts else SUFFIXES
    if out is not None and out.suffix not in allowed:
        return [Violation("--out", f"must end in {', '.join(allowed)}, is {out.name}")]
    return []


def write_samples(
    sampler: Sampler, *, start: int, count: int | None, out: Path | None, rendering: Rendering | None
) -> None:
    """Draw and write requests; count None: all of a replay."""
    last = start + count if count is not None else sampler.request_count
    if sampler.request_count is not None:
        last = min(last or sampler.request_count, sampler.request_count)
    if last is None or last <= start:
        raise InvalidInputError([Violation("--start", f"there are no requests from {start} on")])
    renderer = _renderer(rendering) if rendering else None
    batch_requests = BATCH_PROMPTS if renderer else BATCH_REQUESTS
    target: AbstractContextManager[BinaryIO] = written_whole(out) if out else nullcontext(sys.stdout.buffer)
    suffix = out.suffix if out else (".jsonl" if renderer else ".csv")
    is_long = last - start > batch_requests
    progress = shown_progress("requests drawn") if is_long else nullcontext(_unseen)
    with progress as advance, target as file:
        samples = _samples(sampler, start, last, batch_requests)
        if renderer:
            for sample in samples:
                file.writelines(map(_prompt_line, renderer.render(sample)))
                advance(sample.start + len(sample) - start, last - start)
        else:
            _write_tables(samples, file, suffix, advance=lambda done: advance(done - start, last - start))
        file.flush()
    if out:
        sys.stderr.write(f"{last - start:,} requests written to {out}\n")


def _unseen(done: int, total: int | None) -> None:
    """Short work needs no progress."""


def _samples(sampler: Sampler, start: int, last: int, batch_requests: int) -> Iterator[Sample]:
    for first in range(start, last, batch_requests):
        yield sampler.draw(first, min(batch_requests, last - first))


def _write_tables(samples: Iterator[Sample], file: BinaryIO, suffix: str, *, advance: Callable[[int], None]) -> None:
    writer: _Writer | None = None
    for sample in samples:
        table = sample.to_arrow()
        writer = writer or _writer(file, suffix, table.schema)
        writer.write(table)
        advance(sample.start + len(sample))
    if writer:
        writer.close()


def _writer(file: BinaryIO, suffix: str, schema: pa.Schema) -> _Writer:
    if suffix == ".parquet":
        return cast("_Writer", pq.ParquetWriter(file, schema, compression="zstd"))
    if suffix == ".csv":
        return cast(
            "_Writer", pa_csv.CSVWriter(file, schema, write_options=pa_csv.WriteOptions(quoting_style="needed"))
        )
    return _JsonLines(file)


class _JsonLines:
    """A line per request."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, table: pa.Table) -> None:
        self._file.writelines(f"{json.dumps(row)}\n".encode() for row in table.to_pylist())

    def close(self) -> None:
        """Nothing is held back."""


def _renderer(rendering: Rendering) -> Renderer:
    return Renderer(
        RenderOptions(
            tokenizer=read_tokenizer(rendering.tokenizer) if rendering.tokenizer else None,
            corpus=read_corpus(rendering.corpus) if rendering.corpus else None,
            seed=rendering.seed,
            shared_prefix_ratio=rendering.shared_prefix_ratio,
            prefix_group_count=rendering.prefix_group_count,
            server=Server(rendering.server) if rendering.server else None,
            served_model=rendering.served_model,
        )
    )


def _prompt_line(request: RenderedRequest) -> bytes:
    line: dict[str, object] = {
        "index": request.index,
        "prompts": request.prompts,
        "input_tokens": request.input_tokens,
        "output_tokens": request.output_tokens,
    }
    if request.arrival_nanos is not None:
        line["arrival_nanos"] = request.arrival_nanos
    if request.bodies:
        line["bodies"] = [json.loads(body) for body in request.bodies]
    return f"{json.dumps(line, ensure_ascii=False)}\n".encode()
