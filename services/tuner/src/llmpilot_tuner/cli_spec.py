"""The tuning that the options of `llm-pilot tune` mean.

Invariant: every wrong option is told at once, by the name that it has on the command line.
"""

import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from llmpilot_contracts.errors import InvalidInputError, NotFoundError, Violation
from llmpilot_perfmodel.bundled_llms import bundled_config, find_bundled
from llmpilot_perfmodel.gpu_catalogue import Gpu, load_catalogue
from llmpilot_perfmodel.llm_config import parse_llm
from llmpilot_tuner.cli_options import TuneOptions
from llmpilot_tuner.domain.defaults import (
    DEFAULT_MOST_REQUESTS,
    default_longest_sequence,
    default_most_new_tokens,
    default_reserved_bytes,
)
from llmpilot_tuner.domain.probing import ProbeKind
from llmpilot_tuner.domain.servers import Server
from llmpilot_tuner.domain.spec import ServerTarget, TuningSpec

WEIGHT_FILES = ("*.safetensors", "*.bin")
URL_SCHEMES = ("http", "https", "grpc", "grpcs")

_OPTION_OF = {
    "config_json": "--config",
    "gpu_count": "--gpus",
    "gpu_memory_bytes": "--gpu-memory",
    "reserved_bytes": "--reserve",
    "precision_name": "--precision",
    "longest_sequence": "--longest-sequence",
    "most_new_tokens": "--max-new-tokens",
    "most_requests": "--max-requests",
    "prefill_limit": "--prefill-limit",
    "granule": "--granule",
    "precision": "--precision-percent",
    "step_seconds": "--step-seconds",
    "soak_steps": "--soak-steps",
    "model_folder": "--model",
    "server": "--server",
    "probe": "--probe",
    "target": "--url",
    "url": "--url",
    "command": "--start",
    "start_seconds": "--start-seconds",
    "eager_attention": "--eager-attention",
}


def spec_of(options: TuneOptions) -> TuningSpec:
    """Return the tuning that the options mean; InvalidInputError with everything that is wrong, or NotFoundError."""
    return _SpecReader(options).read()


def in_options(error: InvalidInputError) -> InvalidInputError:
    """Return an error about a specification as one about the options that it was made of."""

    def named(violation: Violation) -> Violation:
        last = violation.field.rpartition(".")[2]
        return Violation(_OPTION_OF.get(last, violation.field), words_in_options(violation.description))

    return InvalidInputError(map(named, error.violations))


def words_in_options(text: str) -> str:
    """Return a message about a specification as one about the options that it was made of."""
    return re.sub(r"\b(" + "|".join(map(re.escape, _OPTION_OF)) + r")\b", _option_of_match, text)


def _option_of_match(match: re.Match[str]) -> str:
    return _OPTION_OF[match[1]] if "_" in match[1] else match[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Llm:
    name: str
    text: str
    max_position_count: int | None


class _SpecReader:
    def __init__(self, options: TuneOptions) -> None:
        self._options = options
        self._violations: list[Violation] = []

    def read(self) -> TuningSpec:
        options, kind = self._options, ProbeKind(self._options.probe)
        llm = self._llm()
        gpu, gpu_count, memory_bytes = self._gpu()
        self._check_model(kind)
        target = self._target(kind)
        longest = options.longest_sequence
        if longest is None:
            longest = default_longest_sequence(llm.max_position_count)
        new = options.max_new_tokens
        reserved = options.reserve
        if self._violations:
            raise InvalidInputError(self._violations)
        return TuningSpec(
            config_json=llm.text,
            llm_name=llm.name,
            model_folder=options.model,
            probe=kind,
            server=Server(options.server),
            gpu_name=gpu.name if gpu else "",
            gpu_count=gpu_count,
            gpu_memory_bytes=memory_bytes,
            reserved_bytes=default_reserved_bytes(kind, gpu, gpu_count) if reserved is None else reserved,
            precision_name=options.precision or "",
            eager_attention=options.eager_attention,
            longest_sequence=longest,
            most_new_tokens=default_most_new_tokens(longest) if new is None else new,
            most_requests=DEFAULT_MOST_REQUESTS if options.max_requests is None else options.max_requests,
            prefill_limit=options.prefill_limit,
            prompt_logprobs=options.prompt_logprobs,
            granule=options.granule,
            precision=options.precision_percent / 100,
            step_seconds=options.step_seconds,
            soak_steps=options.soak_steps,
            seed=options.seed,
            target=target,
        )

    def _wrong(self, option: str, problem: str) -> None:
        self._violations.append(Violation(option, problem))

    def _llm(self) -> _Llm:
        options = self._options
        if options.config is None and options.model is None:
            self._wrong("--config", "is needed: a config.json, a folder that holds one, or a bundled LLM's name")
            return _Llm(name="", text="", max_position_count=None)
        name = text = ""
        position_count: int | None = None
        try:
            name, text = _config(options.config or str(options.model))
            position_count = parse_llm(text).spec.max_position_count
        except InvalidInputError as error:
            self._violations += error.violations
        return _Llm(name=name, text=text, max_position_count=position_count)

    def _gpu(self) -> tuple[Gpu | None, int, int]:
        """Return type, number and memory of the GPUs."""
        options = self._options
        if options.gpu is not None:
            for name, value in {"--gpu-memory": options.gpu_memory, "--gpus": options.gpus}.items():
                if value is not None:
                    self._wrong(name, "goes without --gpu, which says it")
            profile = load_catalogue().require(options.gpu)
            return profile.gpu, profile.gpu_count, profile.gpu.usable_memory_bytes
        if options.gpu_memory is None:
            self._wrong("--gpu-memory", "is needed, e.g. 24GiB, or --gpu with a GPU profile, e.g. 1xA100-40GB")
        elif options.gpu_memory == 0:
            self._wrong("--gpu-memory", "must be > 0, is 0")
        return None, 1 if options.gpus is None else options.gpus, options.gpu_memory or 0

    def _check_model(self, kind: ProbeKind) -> None:
        folder = self._options.model
        if folder is None:
            return
        if kind not in {ProbeKind.CPU, ProbeKind.TORCH}:
            self._wrong("--model", f"goes with --probe cpu or torch: {kind.value} reads no weights")
        if not any(path for pattern in WEIGHT_FILES for path in folder.glob(pattern)):
            problem = f"{folder} has no weights ({', '.join(WEIGHT_FILES)}); without --model random ones are as large"
            self._wrong("--model", problem)

    def _target(self, kind: ProbeKind) -> ServerTarget | None:
        options = self._options
        given = {
            "--url": options.url,
            "--start": options.start,
            "--start-seconds": options.start_seconds,
            "--server-log": options.server_log,
        }
        if kind is not ProbeKind.SERVER:
            for name, value in given.items():
                if value is not None:
                    self._wrong(name, "goes with --probe server")
            return None
        if options.url is None:
            self._wrong("--url", "is needed by --probe server: where it serves, or will when --start has started it")
            return None
        if not _is_url(options.url):
            self._wrong("--url", f"must be like http://HOST:8000 or grpc://HOST:8033, is {options.url[:80]!r}")
        if options.start is None and options.start_seconds is not None:
            self._wrong("--start-seconds", "goes with --start")
        if options.start is not None and options.server_log is not None:
            self._wrong("--server-log", "goes without --start, as what that writes is read anyway")
        elif options.server_log is not None and not os.access(options.server_log, os.R_OK):
            self._wrong("--server-log", f"{options.server_log} cannot be read here")
        target = ServerTarget(url=options.url, command=self._command(), log_file=options.server_log)
        return target if options.start_seconds is None else replace(target, start_seconds=options.start_seconds)

    def _command(self) -> tuple[str, ...]:
        text = self._options.start
        if text is None:
            return ()
        try:
            command = tuple(shlex.split(text))
        except ValueError as error:
            self._wrong("--start", f"cannot be split into words: {error}")
            return ()
        if not command:
            self._wrong("--start", "is empty: give the command that starts the server, or leave --start out")
        return command


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in URL_SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of its port
        return False


def _config(llm: str) -> tuple[str, str]:
    """Return name and text of a config.json; raises NotFoundError and InvalidInputError."""
    path = Path(llm)
    if path.is_dir():
        path /= "config.json"
    if path.suffix != ".json" and not path.is_file():
        bundled = find_bundled(llm)
        return (bundled.name if bundled else llm), bundled_config(llm)
    try:
        return path.resolve().parent.name, path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFoundError("config.json", str(path)) from error
    except OSError as error:
        raise InvalidInputError([Violation("--config", f"{path} cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise InvalidInputError([Violation("--config", f"{path} must be text in UTF-8")]) from error
