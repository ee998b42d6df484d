"""What is sent to a server for a request: the JSON of OpenAI's and TGI's endpoints, the parameters of TGIS.

Invariant: a parameter that is None is not sent; "no limit" is said in the server's own words, so that no default of its
own takes its place.
Source: vllm/entrypoints/openai, text-generation-inference's router/src/lib.rs, proto/fmaas/generation.proto.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from llmpilot_workload_generator.prompts.sampling_parameters import NO_TOP_K, NO_TOP_P, SamplingParameters

_REMEMBERED_ENDS = 100_000
_ALL_OF_VLLM = -1
"""`top_k` of vLLM for all tokens; without it the model's generation_config.json decides."""


class Server(StrEnum):
    """Whose requests are written."""

    OPENAI_COMPLETIONS = "openai-completions"
    """/v1/completions with vLLM's extensions; all prompts of a request in one body."""
    OPENAI_CHAT = "openai-chat"
    """/v1/chat/completions with vLLM's extensions; a body per prompt. The server's chat template adds tokens."""
    TGI = "tgi"
    """/generate_stream; a body per prompt. TGI cannot be told to go on after the end of the text."""
    TGIS = "tgis"
    """gRPC: no body; see `tgis_parameters` and wire_tgis.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TgisParameters:
    """The parameters of a call of TGIS, as its protocol has them."""

    is_sampled: bool
    temperature: float | None
    """None: not sent, as 0 is "no limit" for TGIS and "greedy" for vllm-tgis-adapter."""
    top_k: int
    """0: all."""
    top_p: float
    """0: all."""
    max_new_tokens: int
    min_new_tokens: int


def tgis_parameters(
    sampling: SamplingParameters, output_tokens: int, *, fixed_output_length: bool = True
) -> TgisParameters:
    """Return a request's parameters for TGIS, whose default is greedy."""
    return TgisParameters(
        is_sampled=_is_sampled(sampling),
        temperature=sampling.temperature,
        top_k=sampling.top_k or NO_TOP_K,
        top_p=sampling.top_p or 0.0,
        max_new_tokens=output_tokens,
        min_new_tokens=output_tokens if fixed_output_length else 0,
    )


class BodyWriter:
    """Writes the bodies of requests to one server."""

    def __init__(self, server: Server, *, served_model: str = "", fixed_output_length: bool = True) -> None:
        """served_model: the model's name, without which OpenAI's endpoints refuse; TGI has none."""
        self._server = server = Server(server)
        self._fixed_output_length = fixed_output_length
        model = json.dumps(served_model)
        self._begin = {
            Server.OPENAI_COMPLETIONS: f'{{"model":{model},"prompt":',
            Server.OPENAI_CHAT: f'{{"model":{model},"messages":[{{"role":"user","content":',
            Server.TGI: '{"inputs":',
            Server.TGIS: "",
        }[server]
        self._ends: dict[tuple[SamplingParameters, int], str] = {}

    def write(self, prompts: Sequence[str], sampling: SamplingParameters, output_tokens: int) -> tuple[bytes, ...]:
        """Return the bodies of a request, in the order of its prompts; TGIS has none."""
        if self._server is Server.TGIS:
            return ()
        end = self._ends.get((sampling, output_tokens)) or self._remembered_end(sampling, output_tokens)
        if self._server is Server.OPENAI_COMPLETIONS and len(prompts) > 1:
            return (f"{self._begin}{json.dumps(prompts, separators=(',', ':'))}{end}".encode(),)
        return tuple([f"{self._begin}{json.dumps(prompt)}{end}".encode() for prompt in prompts])

    def _remembered_end(self, sampling: SamplingParameters, output_tokens: int) -> str:
        if len(self._ends) >= _REMEMBERED_ENDS:
            self._ends.clear()
        is_tgi = self._server is Server.TGI
        fields = _tgi_fields(sampling, output_tokens) if is_tgi else self._openai_fields(sampling, output_tokens)
        text = json.dumps(fields, separators=(",", ":"))
        if is_tgi:
            end = f',"parameters":{text}}}'
        else:
            end = f"{'}]' if self._server is Server.OPENAI_CHAT else ''},{text[1:]}"
        self._ends[sampling, output_tokens] = end
        return end

    def _openai_fields(self, sampling: SamplingParameters, output_tokens: int) -> dict[str, object]:
        fields: dict[str, object] = {"max_tokens": output_tokens}
        if self._fixed_output_length:
            fields |= {"min_tokens": output_tokens, "ignore_eos": True}
        if sampling.greedy:
            fields["temperature"] = 0.0
        else:
            top_k = _ALL_OF_VLLM if sampling.top_k == NO_TOP_K else sampling.top_k
            fields |= _given({"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": top_k})
        return fields | {"stream": True, "stream_options": {"include_usage": True}}


def _tgi_fields(sampling: SamplingParameters, output_tokens: int) -> dict[str, object]:
    """TGI has no word for "no limit": it has none unless told."""
    fields: dict[str, object] = {"max_new_tokens": output_tokens, "details": True}
    if not _is_sampled(sampling):
        return fields
    limits = {
        "temperature": sampling.temperature,
        "top_p": None if sampling.top_p == NO_TOP_P else sampling.top_p,
        "top_k": None if sampling.top_k == NO_TOP_K else sampling.top_k,
    }
    return fields | {"do_sample": True} | _given(limits)


def _is_sampled(sampling: SamplingParameters) -> bool:
    """Whether to sample where greedy is the server's default: asked for, or meant by a parameter of sampling."""
    if sampling.greedy is None:
        return any(value is not None for value in (sampling.temperature, sampling.top_p, sampling.top_k))
    return not sampling.greedy


def _given(fields: dict[str, float | None]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None}
