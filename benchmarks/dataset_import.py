"""Times the import of the public raw records against the method of the published notebook.

    python benchmarks/dataset_import.py [ARCHIVE]

Ours reads the whole compressed archive. The notebook's method (Preprocess_data.ipynb, written anew here: pandas, three
`eval` of each list, medians per load test; without its dumps to CSV) would take minutes, so it gets every 20th file by
size, already unpacked and in memory, and its times are scaled by bytes. Each runs in a fresh process; memory is not
scaled. The medians that both have must agree.
"""

import io
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

SAMPLE_STEP = 20
GROUP = ["model", "gpu", "num_users"]
DATA = Path(os.environ.get("LLMPILOT_DATA", Path(__file__).parents[2] / "shared" / "data"))
ARCHIVE = DATA / "llm-pilot" / "performance_characterization_data_raw.tar.xz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What one method took."""

    wall_seconds: float
    cpu_seconds: float
    medians: dict[str, tuple[float, float]]
    """Median nTTFT and ITL of each load test."""
    file_count: int = 0
    timed_bytes: int = 0
    archive_bytes: int = 0
    peak_mb: float = 0


def run_ours(archive: Path) -> Timing:
    """Time the import of the whole archive."""
    from llmpilot_recommender.dataset_import import import_raw  # noqa: PLC0415 the other process does not pay for it

    started, cpu_started = time.perf_counter(), time.process_time()
    measurements = import_raw(archive)
    return Timing(
        wall_seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
        medians={
            f"{row.llm} {row.gpu_profile.partition('-')[0]} {row.users_count}": (row.nttft.median_ms, row.itl.median_ms)
            for row in measurements
            if row.nttft.median_ms is not None and row.itl.median_ms is not None
        },
        peak_mb=peak_mb(),
    )


def run_published(archive: Path) -> Timing:
    """Time the notebook's method on a sample of the files, not counting the time to unpack them."""
    import pandas as pd  # noqa: PLC0415 the other process does not pay for it

    from llmpilot_recommender.raw_source import raw_csvs  # noqa: PLC0415

    lengths = sorted((len(content), name) for name, content in raw_csvs(archive)[0])
    chosen = {name for _, name in lengths[SAMPLE_STEP // 2 :: SAMPLE_STEP]}
    sample = [content for name, content in raw_csvs(archive)[0] if name in chosen]

    def parse(text: str) -> list[int]:
        parsed: list[int] = eval(text, {"__builtins__": {}})  # noqa: S307 what is being timed; no names can be called
        return parsed

    started, cpu_started = time.perf_counter(), time.process_time()
    frame = pd.DataFrame()
    for content in sample:
        part = pd.read_csv(io.BytesIO(content))
        part = part[part["status"] == 200]
        part["gpu"] = part["n_gpus"].astype(str) + "x" + part["gpu_type"]
        frame = pd.concat([frame, part])
    medians = {}
    for (llm, gpu, users_count), group in frame.groupby(GROUP):
        texts = group["latency_ms_per_token"]
        ttft = [parse(text)[1] for text in texts]
        nttft = [parse(text)[1] / tokens for text, tokens in zip(texts, group["n_input_tokens"], strict=True)]
        itl = [entry for text in texts for entry in parse(text)[2:]]
        _, median_nttft, median_itl = (float(pd.Series(values).median()) for values in (ttft, nttft, itl))
        medians[f"{llm} {gpu} {users_count}"] = median_nttft, median_itl
    return Timing(
        wall_seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
        medians=medians,
        file_count=len(sample),
        timed_bytes=sum(map(len, sample)),
        archive_bytes=sum(length for length, _ in lengths),
        peak_mb=peak_mb(),
    )


def peak_mb() -> float:
    """Return the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_fresh_process(method: str, archive: Path) -> Timing:
    """Run one of the two methods where it shares nothing with the other."""
    command = [sys.executable, __file__, str(archive), method]
    return Timing(**json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))


def report(archive: Path) -> None:
    """Run both and print the table."""
    published, ours = in_fresh_process("published", archive), in_fresh_process("ours", archive)
    scale = published.archive_bytes / published.timed_bytes
    apart = max(
        abs(theirs - own) / theirs
        for key, medians in published.medians.items()
        for theirs, own in zip(medians, ours.medians[key], strict=True)
    )
    wall_seconds, cpu_seconds = published.wall_seconds * scale, published.cpu_seconds * scale
    print(f"{archive.name}: {published.archive_bytes / 1e6:.0f} MB unpacked; {os.cpu_count()} cores")
    print(
        f"published method timed on {published.file_count} files, {published.timed_bytes / 1e6:.1f} MB: "
        f"{published.wall_seconds:.2f} s, scaled by {scale:.1f}"
    )
    print(f"{'':36}{'wall s':>8}{'CPU s':>8}{'peak MB':>9}")
    print(f"{'published method, scaled, unpacked':36}{wall_seconds:8.1f}{cpu_seconds:8.1f}{published.peak_mb:8.0f}*")
    print(f"{'ours, whole archive, compressed':36}{ours.wall_seconds:8.1f}{ours.cpu_seconds:8.1f}{ours.peak_mb:9.0f}")
    print(f"{'ratio':36}{wall_seconds / ours.wall_seconds:8.1f}{cpu_seconds / ours.cpu_seconds:8.1f}")
    print(f"largest relative difference among {2 * len(published.medians)} medians: {apart:.1e}")
    print("* with the sample only")


def main() -> None:
    """Report, or be one of the fresh processes."""
    archive = Path(sys.argv[1]) if len(sys.argv) > 1 else ARCHIVE
    if len(sys.argv) < 3:
        report(archive)
    else:
        run = run_ours if sys.argv[2] == "ours" else run_published
        print(json.dumps(asdict(run(archive))))


if __name__ == "__main__":
    main()
