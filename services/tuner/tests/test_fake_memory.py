import runpy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the extra llm-pilot-tuner[torch] is not installed")

from torch.profiler import ProfilerActivity, profile  # noqa: E402

from llmpilot_perfmodel.architecture import Architecture  # noqa: E402
from llmpilot_perfmodel.bundled_llms import bundled_config  # noqa: E402
from llmpilot_perfmodel.llm_config import parse_llm  # noqa: E402
from llmpilot_perfmodel.precision import precision_named  # noqa: E402
from llmpilot_perfmodel.sizes import llm_work  # noqa: E402
from llmpilot_perfmodel.step_memory.batch import Attention, Batch, Execution, Layout, Rows  # noqa: E402
from llmpilot_tuner.torch_worker.fake_memory import CUDA_ROUNDING_BYTES, FakeMemory  # noqa: E402
from llmpilot_tuner.torch_worker.forward import StepRunner  # noqa: E402

_TINY = runpy.run_path(str(Path(__file__).parent / "tiny_llms.py"))
TINY_LLMS, tiny_llm = _TINY["TINY_LLMS"], _TINY["tiny_llm"]

PREFILL = Batch(case="prefill", prefill=(Rows(request_count=3, input_tokens=200, output_tokens=1),))
MANY = Batch(case="many", prefill=(Rows(request_count=20, input_tokens=11, output_tokens=1),))
DECODE = Batch(case="decode", decode=(Rows(request_count=13, input_tokens=61, output_tokens=20),))
MIXED = Batch(
    case="mixed",
    prefill=(Rows(request_count=2, input_tokens=150, output_tokens=1),),
    residents=(Rows(request_count=3, input_tokens=100, output_tokens=20),),
    copied_tokens=50,
    all_logits=True,
)
CHUNK = Batch(
    case="chunk",
    prefill=(Rows(request_count=2, input_tokens=120, context_tokens=130, output_tokens=1),),
    decode=(Rows(request_count=4, input_tokens=40, output_tokens=2),),
)
KINDS = [
    (name, layout, attention)
    for name in TINY_LLMS
    for layout in Layout
    for attention in Attention
    if name != "t5" or layout is Layout.PADDED
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The CPU's attention takes scratch memory per thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def loaded(config: str, execution: Execution) -> StepRunner:
    made = StepRunner(config_json=config, model_folder=None, execution=execution, device="cpu")
    made.load()
    return made


def real_peak(made: StepRunner, batch: Batch) -> int:
    """Return the most bytes that a step has at once, by the allocations and releases that torch's profiler sees."""
    made.run(batch)  # kernels prepare themselves when they run first
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        made.run(batch)
    changes: list[int] = [
        event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    assert sum(changes) == 0
    return max(accumulate(changes))


def fake_peaks(
    config: str,
    execution: Execution,
    batches: Sequence[Batch],
    *,
    rounding_bytes: int = CUDA_ROUNDING_BYTES,
    shortcuts: bool = True,
) -> tuple[int, list[int]]:
    """Return the bytes of weights and buffers, and the peak of each batch beyond them."""
    with FakeMemory(2**50, rounding_bytes=rounding_bytes, shortcuts=shortcuts) as memory:
        made = loaded(config, execution)
        start = memory.live_bytes
        peaks = []
        for batch in batches:
            memory.reset_peak()
            made.run(batch)
            assert memory.live_bytes == start
            peaks.append(memory.peak_bytes - start)
    return start, peaks


@pytest.mark.parametrize(("name", "layout", "attention"), KINDS)
def test_fake_memory_is_the_real_memory_of_the_cpu_within_a_thousandth(
    name: str, layout: Layout, attention: Attention
) -> None:
    execution = Execution(layout=layout, attention=attention, activation_bits=32)
    batches = [PREFILL, MANY, DECODE, MIXED, *([CHUNK] if layout is Layout.PACKED else [])]
    _, fake = fake_peaks(TINY_LLMS[name], execution, batches, rounding_bytes=0)
    made = loaded(TINY_LLMS[name], execution)
    for batch, peak in zip(batches, fake, strict=True):
        assert peak == pytest.approx(real_peak(made, batch), rel=1e-3), batch.case


@pytest.mark.parametrize("name", list(TINY_LLMS))
def test_it_is_so_in_16_bits(name: str) -> None:
    execution = Execution(layout=Layout.PADDED if name == "t5" else Layout.PACKED)
    _, fake = fake_peaks(TINY_LLMS[name], execution, [PREFILL, DECODE], rounding_bytes=0)
    made = loaded(TINY_LLMS[name], execution)
    for batch, peak in zip([PREFILL, DECODE], fake, strict=True):
        assert peak == pytest.approx(real_peak(made, batch), rel=1e-3), batch.case


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *((name, Attention.FUSED) for name in ("llama-gqa", "gpt-neox", "gpt-bigcode", "mixtral")),
        ("llama-gqa", Attention.EAGER),
    ],
)
def test_what_shortcuts_leave_out_takes_no_more(name: str, attention: Attention) -> None:
    """Few layers and one request of each shape have the very peak of all layers and all requests."""
    execution = Execution(layout=Layout.PACKED, attention=attention)
    config = tiny_llm(name, **{"n_layer" if name == "gpt-bigcode" else "num_hidden_layers": 5})
    batches = [replace(PREFILL, pool_tokens=5000), DECODE, MIXED, CHUNK]
    assert fake_peaks(config, execution, batches) == fake_peaks(config, execution, batches, shortcuts=False)


@pytest.mark.parametrize("name", list(TINY_LLMS))
def test_after_loading_a_part_of_an_llm_only_its_weights_are_alive_and_never_more_were(name: str) -> None:
    """But for the frequencies of rotary positions, a few numbers."""
    execution = Execution(layout=Layout.PADDED, activation_bits=32, gpu_count=2)
    with FakeMemory(2**40, rounding_bytes=0) as memory:
        made = StepRunner(config_json=TINY_LLMS[name], model_folder=None, execution=execution, device="cpu")
        made.load()
        assert made.weight_bytes <= memory.live_bytes <= memory.peak_bytes < made.weight_bytes + 100


def test_a_gpu_gives_out_multiples_of_512_bytes() -> None:
    with FakeMemory(2**20) as memory:
        one = torch.empty(1, dtype=torch.uint8)
        assert memory.live_bytes == 512
        two = torch.empty(513, dtype=torch.uint8)
        assert memory.live_bytes == 512 + 1024
        view, _ = two[5:], one.add_(1)
        del two
        assert memory.live_bytes == 512 + 1024  # the view holds it
        del view, one, _
        assert memory.live_bytes == 0
        assert memory.peak_bytes == 512 + 1024


def test_memory_ends_at_its_capacity_and_not_before() -> None:
    with FakeMemory(4096) as memory:
        kept = torch.empty(3584, dtype=torch.uint8)
        last = torch.empty(512, dtype=torch.uint8)
        with pytest.raises(torch.OutOfMemoryError, match="4096 of 4096"):
            torch.empty(1, dtype=torch.uint8)
        del kept
        assert memory.live_bytes == last.nbytes
        assert memory.peak_bytes == 4096


def test_outside_of_it_tensors_are_real() -> None:
    with FakeMemory(2**20) as memory:
        assert FakeMemory.active() is memory
    assert FakeMemory.active() is None
    assert torch.ones(3).sum().item() == 3


def test_fused_attention_on_a_gpu_keeps_no_scores() -> None:
    """Output, 16 bits, and a 32-bit number for each query; scores of 16 bits would be 2 MB."""
    heads, tokens, size = 2, 1024, 64
    with FakeMemory(2**30) as memory, torch.inference_mode():
        query = torch.empty(1, heads, tokens, size, dtype=torch.bfloat16)
        before = memory.live_bytes
        memory.reset_peak()
        output = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        assert memory.live_bytes - before == output.nbytes == heads * tokens * size * 2
        assert memory.peak_bytes - before == heads * tokens * (size * 2 + 4)


@pytest.mark.parametrize(("llm", "gpu_count"), [("Llama-3.1-8B", 1), ("Llama-3.1-70B", 1), ("Llama-3.1-70B", 8)])
def test_full_size_llms_take_what_arithmetic_says(llm: str, gpu_count: int) -> None:
    """Embeddings, the layer's input and its residual live all along: then the feed-forward, or a 32-bit norm."""
    config = bundled_config(llm)
    sizes = parse_llm(config).architecture
    assert isinstance(sizes, Architecture)
    requests, length, pool = 4, 8191, 40_000
    batch = Batch(
        case="prefill", prefill=(Rows(request_count=requests, input_tokens=length, output_tokens=1),), pool_tokens=pool
    )
    start, (peak,) = fake_peaks(config, Execution(layout=Layout.PACKED, gpu_count=gpu_count), [batch])
    if gpu_count == 1:
        assert start == pytest.approx(llm_work(parse_llm(config), 1, precision_named("bf16")).weight_bytes, abs=1e4)
    tokens, width, inner = requests * length, sizes.hidden_size, sizes.inner_size // gpu_count
    cache = pool * 2 * sizes.layer_count * max(1, sizes.key_value_head_count // gpu_count) * sizes.head_size * 2
    feed_forward = 4 * width + 3 * inner  # what is normed, too; the gate's activation, up, and their product
    norm = 7 * width  # its input and its square, each as large as two of 16 bits
    positions = 2 * sizes.head_size * 2 + 16  # cosine and sine of each token, its number and its position
    assert peak - cache == pytest.approx(tokens * (2 * max(feed_forward, norm) + positions), rel=1e-3)
