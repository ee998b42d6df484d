"""Times the making of prompts: requests/s on one core, with and without bodies, against encoding the same prompts.

    python benchmarks/workload_rendering.py [--requests N] [--repeats N] [--tokenizer PATH]

Lengths are those of the published fmperf model (mean 230 tokens), one prompt per request unless a row says otherwise;
where its file is not there, lognormal ones of that mean. All on one core; the best of the repeats, CPU time. Target:
20,000 requests/s, so that a load test of 1,000 requests/s takes 5 % of a core.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import numpy as np  # noqa: E402 after the threads are limited

from llmpilot_workload_generator.imports.model_import import import_model  # noqa: E402
from llmpilot_workload_generator.model import BATCH_SIZE, INPUT_TOKENS, OUTPUT_TOKENS  # noqa: E402
from llmpilot_workload_generator.prompts.rendering import Renderer, RenderOptions  # noqa: E402
from llmpilot_workload_generator.prompts.request_bodies import Server  # noqa: E402
from llmpilot_workload_generator.prompts.tokenizer import default_tokenizer, read_tokenizer  # noqa: E402
from llmpilot_workload_generator.sampling.sampler import Sample, SampleOptions, Sampler  # noqa: E402

DATA = Path(os.environ.get("LLMPILOT_DATA", Path(__file__).parents[2] / "shared" / "data"))
MODEL = DATA / "fmperf" / "all_nbins_64.pkl"
MEAN_TOKENS = 230.0
LOG_DEVIATION = 1.2
SMALL_BATCH = 256
"""What a gRPC message holds."""
LOAD_TEST_RATE = 1000.0
ENCODED_REQUESTS = 5000


def drawn(count: int, least_tokens: int) -> tuple[Sample, str]:
    """Return requests and where their lengths are from."""
    if MODEL.is_file():
        condition = f"{INPUT_TOKENS} >= {least_tokens}"
        sampler = Sampler(import_model(MODEL), SampleOptions(conditions=(condition,)))
        return sampler.draw(0, count), "the fmperf model"
    random = np.random.default_rng(0)
    lengths = random.lognormal(np.log(MEAN_TOKENS) - LOG_DEVIATION**2 / 2, LOG_DEVIATION, count)
    inputs = np.maximum(np.rint(lengths).astype(np.int64), least_tokens)
    outputs = np.full(count, 18, np.int64)
    columns = {INPUT_TOKENS: inputs, OUTPUT_TOKENS: outputs, BATCH_SIZE: np.ones(count, np.int64)}
    return Sample(columns=columns, start=0, arrival_nanos=None), "a lognormal distribution"


def part(sample: Sample, begin: int, end: int, *, with_batches: bool) -> Sample:
    """Return some requests of a sample."""
    columns = {name: column[begin:end] for name, column in sample.columns.items() if with_batches or name != BATCH_SIZE}
    return Sample(columns=columns, start=sample.start + begin, arrival_nanos=None)


def rate(call: Callable[[], object], count: int, repeats: int) -> float:
    """Return the best number of requests per CPU second."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)
    return count / min(seconds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokenizer", type=Path)
    given = parser.parse_args()
    tokenizer = read_tokenizer(given.tokenizer) if given.tokenizer else default_tokenizer()
    count, repeats = given.requests, given.repeats
    sample, source = drawn(count, tokenizer.special_count + 1)
    single = part(sample, 0, count, with_batches=False)
    started = time.process_time()
    plain = Renderer(RenderOptions(tokenizer=tokenizer))
    prepared_seconds = time.process_time() - started
    requests = plain.render(single)
    prompts = [request.prompts[0] for request in requests]
    wrong = sum(
        tokenizer.count(prompt) != request.input_tokens for prompt, request in zip(prompts, requests, strict=True)
    )
    encoded = prompts[:ENCODED_REQUESTS]

    def options(server: Server | None = None, ratio: float = 0.0) -> RenderOptions:
        return RenderOptions(tokenizer=tokenizer, server=server, served_model="llm", shared_prefix_ratio=ratio)

    def in_messages() -> None:
        for begin in range(0, count, SMALL_BATCH):
            plain.render(part(single, begin, begin + SMALL_BATCH, with_batches=False))

    rows: list[tuple[str, Callable[[], object], int]] = [
        ("prompts", partial(plain.render, single), count),
        (f"prompts, {SMALL_BATCH} requests at a time", in_messages, count),
    ]
    for server in (Server.OPENAI_COMPLETIONS, Server.OPENAI_CHAT, Server.TGI):
        renderer = Renderer(options(server))
        rows.append((f"prompts and bodies, {server}", partial(renderer.render, single), count))
    sharing = Renderer(options(ratio=0.5))
    batched = Renderer(options(Server.OPENAI_COMPLETIONS))
    mean_batch = sample.columns[BATCH_SIZE].astype(np.float64).mean()
    rows += [
        ("prompts that share half with others", partial(sharing.render, single), count),
        (f"batches of {mean_batch:.2f} prompts and bodies, completions", partial(batched.render, sample), count),
        ("peer: encoding the same prompts once", lambda: [tokenizer.count(one) for one in encoded], len(encoded)),
    ]
    mean_tokens = single.columns[INPUT_TOKENS].astype(np.float64).mean()
    print(f"{count:,} requests with the lengths of {source}: {mean_tokens:.1f} tokens on average, {wrong} not exact")
    print(f"preparation of {tokenizer.label}: {prepared_seconds:.2f} CPU s\n")
    print(f"| work | requests/s on one core | share of a core at {LOAD_TEST_RATE:,.0f} requests/s |\n|---|---|---|")
    for name, call, row_count in rows:
        measured = rate(call, row_count, repeats)
        print(f"| {name} | {measured:,.0f} | {LOAD_TEST_RATE / measured:.1%} |")


if __name__ == "__main__":
    main()
