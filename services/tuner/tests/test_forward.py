import importlib.util
import json
import runpy
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the extra llm-pilot-tuner[torch] is not installed")

from llmpilot_contracts.errors import InvalidInputError, PreconditionError  # noqa: E402
from llmpilot_perfmodel.llm_config import parse_llm  # noqa: E402
from llmpilot_perfmodel.precision import precision_named  # noqa: E402
from llmpilot_perfmodel.sizes import llm_work  # noqa: E402
from llmpilot_perfmodel.step_memory.batch import Attention, Batch, Execution, Layout, Rows  # noqa: E402
from llmpilot_tuner.torch_worker.forward import StepRunner  # noqa: E402
from transformers.cache_utils import DynamicCache  # noqa: E402

_TINY = runpy.run_path(str(Path(__file__).parent / "tiny_llms.py"))
TINY_LLMS, tiny_llm = _TINY["TINY_LLMS"], _TINY["tiny_llm"]
DECODERS = ("llama-mha", "llama-gqa", "gpt-neox", "gpt-bigcode", "mixtral")
FP32 = {"atol": 2e-5, "rtol": 1e-4}
"""Sums in another order differ in the last bits of 32: logits are of order 0.1 to 1."""


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def runner(name, layout=Layout.PACKED, attention=Attention.FUSED, bits=32, config=None):
    execution = Execution(layout=layout, attention=attention, activation_bits=bits)
    made = StepRunner(config_json=config or TINY_LLMS[name], model_folder=None, execution=execution, device="cpu")
    made.load()
    return made


def plain_logits(made, ids, earlier=0):
    """Return the logits of one request's last token as transformers computes them alone, after `earlier` zero K/V."""
    model, shape = made.loaded.model, made.loaded.cache_shape
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    if earlier:
        for layer in range(shape.layer_count):
            zeros = torch.zeros(1, shape.kv_head_count, earlier, shape.key_size)
            cache.update(zeros, zeros, layer)
    positions = torch.arange(earlier, earlier + len(ids))[None]
    with torch.inference_mode():
        logits = model(input_ids=ids[None], position_ids=positions, past_key_values=cache, use_cache=True).logits[0]
    model.set_attn_implementation(implementation)
    return logits
