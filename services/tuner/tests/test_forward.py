import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the extra llm-pilot-tuner[torch] is not installed")

from torch import Tensor  # noqa: E402
from transformers.cache_utils import DynamicCache  # noqa: E402

from llmpilot_contracts.errors import InvalidInputError, PreconditionError  # noqa: E402
from llmpilot_perfmodel.bundled_llms import bundled_config  # noqa: E402
from llmpilot_perfmodel.llm_config import parse_llm  # noqa: E402
from llmpilot_perfmodel.precision import precision_named  # noqa: E402
from llmpilot_perfmodel.sizes import llm_work  # noqa: E402
from llmpilot_perfmodel.step_memory.batch import Attention, Batch, Execution, Layout, Rows  # noqa: E402
from llmpilot_tuner.torch_worker import forward  # noqa: E402
from llmpilot_tuner.torch_worker.fake_memory import FakeMemory  # noqa: E402
from llmpilot_tuner.torch_worker.forward import StepRunner  # noqa: E402

_TINY = runpy.run_path(str(Path(__file__).parent / "tiny_llms.py"))
TINY_LLMS, tiny_llm = _TINY["TINY_LLMS"], _TINY["tiny_llm"]
DECODERS = [name for name in TINY_LLMS if name != "t5"]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
"""Logits are of order 1, and sums in another order differ in the last of 24 bits of each of some 1000 terms."""


def runner(
    name: str,
    *,
    layout: Layout = Layout.PACKED,
    attention: Attention = Attention.FUSED,
    bits: int = 32,
    config: str | None = None,
    folder: Path | None = None,
) -> StepRunner:
    execution = Execution(layout=layout, attention=attention, activation_bits=bits)
    made = StepRunner(
        config_json=config or TINY_LLMS[name], model_folder=folder, execution=execution, device="cpu", seed=3
    )
    made.load()
    return made


def plain_logits(made: StepRunner, ids: Tensor, earlier: int = 0) -> Tensor:
    """Return all logits of one request, as transformers computes them alone after `earlier` tokens of zero K and V."""
    model, shape = made.loaded.model, made.loaded.cache_shape
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    for layer in range(shape.layer_count if earlier else 0):
        zeros = torch.zeros(1, shape.kv_head_count, earlier, shape.key_size)
        cache.update(zeros, zeros, layer)
    positions = torch.arange(earlier, earlier + len(ids))[None]
    with torch.inference_mode():
        logits = model(input_ids=ids[None], position_ids=positions, past_key_values=cache, use_cache=True).logits[0]
    model.set_attn_implementation(implementation)
    return logits


@pytest.mark.parametrize("attention", list(Attention))
@pytest.mark.parametrize("name", DECODERS)
def test_a_packed_step_computes_what_each_request_alone_would(name: str, attention: Attention) -> None:
    made = runner(name, attention=attention)
    batch = Batch(
        case="mixed",
        prefill=(
            Rows(request_count=2, input_tokens=7, output_tokens=1),
            Rows(request_count=1, input_tokens=5, context_tokens=9, output_tokens=1),
        ),
        decode=(Rows(request_count=3, input_tokens=6, output_tokens=2), Rows(request_count=1, input_tokens=1)),
        residents=(Rows(request_count=1, input_tokens=4, output_tokens=3),),
        pool_tokens=100,
        copied_tokens=5,
    )
    output = made.step(batch)
    ids = output.token_ids[0][0]
    alone = [plain_logits(made, ids[:7]), plain_logits(made, ids[7:14]), plain_logits(made, ids[14:19], earlier=9)]
    alone += [plain_logits(made, ids[start : start + 1], earlier=7) for start in (19, 20, 21)]
    alone += [plain_logits(made, ids[22:])]
    torch.testing.assert_close(output.logits[0], torch.stack([logits[-1] for logits in alone]), **CLOSE)


@pytest.mark.parametrize("name", DECODERS)
def test_all_logits_are_those_of_every_input_token(name: str) -> None:
    made = runner(name)
    batch = Batch(case="logits", prefill=(Rows(request_count=2, input_tokens=6, output_tokens=1),), all_logits=True)
    output = made.step(batch)
    ids = output.token_ids[0][0]
    expected = torch.cat([plain_logits(made, ids[:6]), plain_logits(made, ids[6:])])
    torch.testing.assert_close(output.logits[0], expected, **CLOSE)


@pytest.mark.parametrize("attention", list(Attention))
@pytest.mark.parametrize("name", DECODERS)
def test_a_padded_step_computes_what_each_request_alone_would(name: str, attention: Attention) -> None:
    """The last request of a rectangle is one token shorter, so that there is something to mask."""
    made = runner(name, layout=Layout.PADDED, attention=attention)
    batch = Batch(case="prefill", prefill=(Rows(request_count=3, input_tokens=7, output_tokens=1),))
    output = made.step(batch)
    ids = output.token_ids[0]
    expected = [plain_logits(made, ids[0]), plain_logits(made, ids[1]), plain_logits(made, ids[2, 1:])]
    torch.testing.assert_close(output.logits[0], torch.stack([logits[-1] for logits in expected]), **CLOSE)


@pytest.mark.parametrize("name", DECODERS)
def test_a_padded_decode_step_attends_to_the_cache_that_was_made(name: str) -> None:
    made = runner(name, layout=Layout.PADDED)
    output = made.step(Batch(case="decode", decode=(Rows(request_count=2, input_tokens=5, output_tokens=3),)))
    ids = output.token_ids[0]
    expected = [plain_logits(made, ids[0], earlier=7), plain_logits(made, ids[1], earlier=6)]
    torch.testing.assert_close(output.logits[0], torch.cat(expected), **CLOSE)


def test_an_encoder_decoder_prefill_makes_the_first_token_of_each_request() -> None:
    made = runner("t5", layout=Layout.PADDED)
    output = made.step(Batch(case="prefill", prefill=(Rows(request_count=2, input_tokens=9, output_tokens=1),)))
    ids, first = output.token_ids
    model = made.loaded.model
    for request, start in ((0, 0), (1, 1)):
        with torch.inference_mode():
            alone = model(input_ids=ids[request : request + 1, start:], decoder_input_ids=first[request : request + 1])
        # the mask hides the padding, but the distances of T5's position bias count from the first real token alike
        torch.testing.assert_close(output.logits[0][request], alone.logits[0, -1], **CLOSE)


def test_an_encoder_decoder_decode_step_runs_beside_residents() -> None:
    made = runner("t5", layout=Layout.PADDED)
    batch = Batch(
        case="decode",
        prefill=(Rows(request_count=1, input_tokens=4, output_tokens=1),),
        decode=(Rows(request_count=3, input_tokens=6, output_tokens=4),),
        residents=(Rows(request_count=2, input_tokens=5, output_tokens=2),),
        copied_tokens=7,
    )
    output = made.step(batch)
    assert [tuple(logits.shape) for logits in output.logits] == [(1, 2048), (3, 2048)]
    assert not any(logits.isnan().any() for logits in output.logits)


@pytest.mark.parametrize("name", list(TINY_LLMS))
def test_weights_are_as_many_bytes_as_the_formulas_say(name: str) -> None:
    made = runner(name, layout=Layout.PADDED)
    work = llm_work(parse_llm(TINY_LLMS[name]), 1, precision_named("fp32"))
    assert made.weight_bytes == work.weight_bytes


def test_t5_in_16_bit_floats_keeps_its_second_matrices_in_32_bits() -> None:
    made = runner("t5", layout=Layout.PADDED, bits=16)
    work = llm_work(parse_llm(TINY_LLMS["t5"]), 1, precision_named("fp16"))
    assert made.weight_bytes == work.weight_bytes + 2 * work.fp32_parameter_count


@pytest.mark.parametrize("layout", list(Layout))
def test_a_step_that_runs_out_of_memory_leaves_nothing_behind_even_while_its_error_lives(layout: Layout) -> None:
    """Memory ends at every sixth part of what the step needs; the errors are kept."""
    execution = Execution(layout=layout)
    rows = Rows(request_count=4, input_tokens=200, output_tokens=1)
    batch = Batch(case="prefill", prefill=(rows,), residents=(replace(rows, output_tokens=9),), copied_tokens=10)
    errors = []
    with FakeMemory(2**40) as memory:
        made = StepRunner(config_json=TINY_LLMS["llama-gqa"], model_folder=None, execution=execution, device="cpu")
        made.load()
        weights = memory.live_bytes
        memory.reset_peak()
        made.run(batch)
        need = memory.peak_bytes - weights
        for part in range(1, 6):
            memory.capacity_bytes = weights + need * part // 6
            with pytest.raises(torch.OutOfMemoryError) as caught:
                made.run(batch)
            errors.append(caught.value)
            assert memory.live_bytes == weights
        memory.capacity_bytes = weights + need
        made.run(batch)
    assert len(errors) == 5
    assert all("_step" in "".join(error.__notes__) for error in errors)


def test_weights_are_the_same_for_the_same_seed_and_have_no_holes() -> None:
    first, second = runner("gpt-neox").loaded.model, runner("gpt-neox").loaded.model
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


def test_real_weights_are_read_from_their_folder(tmp_path: Path) -> None:
    made = runner("gpt-bigcode")
    made.loaded.model.save_pretrained(tmp_path)
    read = runner("gpt-bigcode", folder=tmp_path)
    batch = Batch(case="prefill", prefill=(Rows(request_count=2, input_tokens=5, output_tokens=1),))
    assert torch.equal(read.step(batch).logits[0], made.step(batch).logits[0])
    assert read.weight_bytes == made.weight_bytes


def test_a_folder_without_weights_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(TINY_LLMS["llama-mha"])
    with pytest.raises(PreconditionError, match=r"has no weights.*model\.safetensors.*leave it out"):
        runner("llama-mha", folder=tmp_path)


def test_broken_weights_are_refused_with_their_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(PreconditionError, match=r"weights in .* cannot be read"):
        runner("llama-mha", folder=tmp_path)


def test_a_model_type_that_transformers_does_not_know_is_named() -> None:
    with pytest.raises(InvalidInputError, match=r"'frobnicator'.*--probe analytic"):
        runner("", config=tiny_llm("llama-mha", model_type="frobnicator"))


def test_a_config_that_transformers_refuses_names_its_model_type() -> None:
    with pytest.raises(InvalidInputError, match="'llama'"):
        runner("", config=tiny_llm("llama-mha", hidden_act="no such function"))


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("llama-mha", {"quantization_config": {"quant_method": "fp8"}}, "quantized weights"),
        ("mpt", {}, "packed tokens"),
        ("t5", {}, "padded batches"),
    ],
)
def test_what_cannot_run_packed_is_refused_with_what_to_do(
    name: str, changes: dict[str, dict[str, str]], word: str
) -> None:
    config = bundled_config("mpt-7b-instruct2") if name == "mpt" else TINY_LLMS[name]
    with pytest.raises(PreconditionError, match=word):
        runner("", config=json.dumps(json.loads(config) | changes))


def test_a_step_before_load_is_a_programming_error() -> None:
    execution = Execution(layout=Layout.PACKED)
    made = StepRunner(config_json=TINY_LLMS["llama-mha"], model_folder=None, execution=execution, device="cpu")
    with pytest.raises(RuntimeError, match="load"):
        made.run(Batch(case="nothing"))


def test_a_packed_batch_of_residents_alone_allocates_its_pool_and_runs_nothing() -> None:
    output = runner("llama-mha").step(Batch(case="nothing", pool_tokens=64))
    assert output == forward.StepOutput(token_ids=(), logits=())
