"""The Hugging Face model behind a config.json, in memory once and where it is wanted.

Invariant: no part of a model is ever in memory twice, and nothing is fetched: code comes with transformers, weights
from a folder, or they are made up, since memory does not depend on their values.
A rank that reads weights has the whole LLM in the machine's memory until it is cut.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.initialization import no_init_weights
from transformers.utils import logging

from llmpilot_contracts.errors import InvalidInputError, PreconditionError, Violation
from llmpilot_perfmodel.architecture import T5Architecture
from llmpilot_perfmodel.llm_config import LlmConfig, parse_llm
from llmpilot_perfmodel.step_memory.batch import Attention, Execution, Layout
from llmpilot_tuner.torch_worker import attention
from llmpilot_tuner.torch_worker.cache import CacheShape
from llmpilot_tuner.torch_worker.fake_memory import FakeMemory
from llmpilot_tuner.torch_worker.sharding import Collective, Shards, key_value_heads_of_rank, shard

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_REFUSALS = (
    ValueError, TypeError, KeyError, AttributeError, ImportError, NotImplementedError, ZeroDivisionError,
    AssertionError, RuntimeError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises on a config.json that it does not understand."""
_PATTERN_LENGTH = 1_000_003
"""Of the random numbers that weights repeat; a prime, so that no two rows of a matrix are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedLlm:
    """A model on its device, or this rank's part of one."""

    model: Any
    config: LlmConfig
    cache_shape: CacheShape
    weight_bytes: int
    is_encoder_decoder: bool


def load_llm(
    *,
    config_json: str,
    model_folder: Path | None,
    execution: Execution,
    device: str,
    rank: int,
    collective: Collective | None,
    seed: int,
) -> LoadedLlm:
    """Return the LLM on the device; raises InvalidInputError for a config.json that cannot be built.

    Raises PreconditionError where it could be built but not run as asked, and whatever torch raises for want of memory.
    """
    config = parse_llm(config_json)
    _refuse_what_cannot_run(config, config_json, execution)
    logging.set_verbosity_error()
    attention.register()
    shards = Shards(rank=rank, count=execution.gpu_count, collective=collective)
    dtype = _dtype(config, execution)
    if model_folder is None:
        model = _built(config_json, dtype, execution)
        if not config.architecture.tied:
            _untie(model)
        shard(model, config, shards)
        _drop_unused(model, device)
        _materialize(model, device, seed)
    else:
        model = _read(config_json, model_folder, dtype, execution)
        shard(model, config, shards)
        _drop_unused(model, device)
        model.to(device)
    model.eval().requires_grad_(False)
    return LoadedLlm(
        model=model,
        config=config,
        cache_shape=_cache_shape(config, shards, dtype, device),
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        is_encoder_decoder=config.spec.is_encoder_decoder,
    )


def _cache_shape(config: LlmConfig, shards: Shards, dtype: Any, device: str) -> CacheShape:
    a = config.architecture
    if isinstance(a, T5Architecture):
        layers, kv_heads = a.decoder_layer_count, a.head_count
    else:
        layers, kv_heads = a.layer_count, a.key_value_head_count
    return CacheShape(
        layer_count=layers,
        kv_head_count=len(key_value_heads_of_rank(kv_heads, shards)),
        key_size=a.head_size,
        value_size=a.head_size,
        dtype=dtype,
        device=device,
    )


def _dtype(config: LlmConfig, execution: Execution) -> Any:
    if execution.activation_bits == 32:  # noqa: PLR2004
        return torch.float32
    return torch.bfloat16 if config.spec.torch_dtype == "bfloat16" else torch.float16


def _refuse_what_cannot_run(config: LlmConfig, config_json: str, execution: Execution) -> None:
    instead = "probe a server that runs it (--probe server), or use the formulas (--probe analytic)"
    if "quantization_config" in json.loads(config_json):
        raise PreconditionError(f"quantized weights run on servers only: {instead}")
    if getattr(config.architecture, "latent_attention", None) is not None:
        raise PreconditionError(f"transformers keeps no compressed cache for latent attention: {instead}")
    if config.spec.is_encoder_decoder and execution.layout is not Layout.PADDED:
        raise PreconditionError("encoder-decoders run in padded batches only: choose a server that pads")


def _implementation(execution: Execution) -> str:
    if execution.layout is Layout.PACKED:
        return attention.PACKED if execution.attention is Attention.FUSED else attention.PACKED_EAGER
    return "sdpa" if execution.attention is Attention.FUSED else "eager"


def _hugging_face_config(config_json: str) -> Any:
    document = json.loads(config_json)
    model_type = document.pop("model_type")
    try:
        config = AutoConfig.for_model(model_type, **document)
        return config.get_text_config(decoder=True) if "text_config" in document else config
    except _REFUSALS as error:
        raise _refused(model_type, error) from error


def _refused(model_type: str, error: BaseException) -> InvalidInputError:
    said = " ".join(str(error).split())[:300]
    return InvalidInputError(
        [
            Violation(
                "config_json",
                f"transformers does not build a {model_type!r} from it ({said}): correct it, or use a probe that needs "
                f"no model code (--probe analytic or server)",
            )
        ]
    )


def _auto_class(config: Any) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _built(config_json: str, dtype: Any, execution: Execution) -> Any:
    """Return the model without memory, on the meta device."""
    config = _hugging_face_config(config_json)
    try:
        with torch.device("meta"), no_init_weights():
            model = _auto_class(config).from_config(config, dtype=dtype, attn_implementation=_implementation(execution))
        model.tie_weights()
    except _REFUSALS as error:
        raise _refused(config.model_type, error) from error
    _refuse_unpacked(model, execution)
    if dtype is torch.float16:
        _keep_in_32_bits(model)
    return model


def _untie(model: Any) -> None:
    """Give T5's output head its own weights: transformers ties it, but not with a checkpoint that has both."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight), requires_grad=False)


def _refuse_unpacked(model: Any, execution: Execution) -> None:
    if execution.layout is Layout.PACKED and not getattr(model, "_supports_attention_backend", False):
        raise PreconditionError(
            f"transformers cannot run model_type {model.config.model_type!r} on packed tokens: "
            "choose a server that pads, or a probe that needs no model code (--probe analytic or server)"
        )


def _keep_in_32_bits(model: Any) -> None:
    """Keep what transformers keeps in 32 bits when it loads 16-bit floats: their range is too small for T5."""
    kept = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()


def _read(config_json: str, folder: Path, dtype: Any, execution: Execution) -> Any:
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise PreconditionError(
            f"{folder} has no weights ({' or '.join(WEIGHT_FILES)}): name the folder that has, or leave it out; "
            "random weights take the same memory"
        )
    config = _hugging_face_config(config_json)
    try:
        model = _auto_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=_implementation(execution),
            local_files_only=True,
        )
    except (OSError, SafetensorError, *_REFUSALS) as error:
        if _is_out_of_memory(error):
            raise
        raise PreconditionError(
            f"the weights in {folder} cannot be read: {' '.join(str(error).split())[:300]}"
        ) from error
    _refuse_unpacked(model, execution)
    return model


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _materialize(model: Any, device: str, seed: int) -> None:
    """Give every parameter memory and, unless tensors are fake, values; tied parameters stay tied."""
    is_fake = FakeMemory.active() is not None
    pattern = None if is_fake else _pattern(model.dtype, device, seed, getattr(model.config, "initializer_range", 0.02))
    made: dict[int, Any] = {}
    for module, name, tensor in list(_own_tensors(model)):
        if id(tensor) not in made:
            made[id(tensor)] = _made(tensor, device, pattern)
        if isinstance(tensor, torch.nn.Parameter):
            module._parameters[name] = made[id(tensor)]
        else:
            module._buffers[name] = made[id(tensor)]
    if not is_fake:
        model.initialize_weights()


def _own_tensors(model: Any) -> Iterator[tuple[Any, str, Any]]:
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    yield module, name, tensor


def _made(tensor: Any, device: str, pattern: Any) -> Any:
    memory = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if isinstance(tensor, torch.nn.Parameter):
        memory = torch.nn.Parameter(memory, requires_grad=False)
        if pattern is not None and memory.dim() > 1:
            _fill(memory, pattern)
            memory._is_hf_initialized = True
        elif pattern is not None:
            memory.zero_()
    return memory


def _pattern(dtype: Any, device: str, seed: int, spread: float) -> Any:
    generator = torch.Generator(device=device).manual_seed(seed)
    numbers = torch.empty(_PATTERN_LENGTH, dtype=torch.float32, device=device)
    return numbers.normal_(0.0, min(spread, 0.1), generator=generator).to(dtype)


def _fill(parameter: Any, pattern: Any) -> None:
    flat = parameter.data.view(-1)
    for start in range(0, flat.numel(), _PATTERN_LENGTH):
        piece = flat[start : start + _PATTERN_LENGTH]
        piece.copy_(pattern[: piece.numel()])


def _drop_unused(model: Any, device: str) -> None:
    """Forget the causal mask that StarCoder's model carries and its attention no longer reads."""
    for module in model.modules():
        mask = module._buffers.get("bias")
        if mask is not None and mask.dtype is torch.bool and mask.dim() == 2:  # noqa: PLR2004
            module._buffers["bias"] = torch.empty(0, dtype=torch.bool, device=device)
            module._buffers["bias"]._is_hf_initialized = True
