"""The options of `llm-pilot tune`, and the tuning that they mean."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from llmpilot_contracts.errors import InvalidInputError, NotFoundError, Violation
from llmpilot_tuner.cli_options import SIZE, TuneOptions, tune_options
from llmpilot_tuner.cli_spec import in_options, spec_of
from llmpilot_tuner.domain.probing import ProbeKind
from llmpilot_tuner.domain.servers import Server
from llmpilot_tuner.domain.spec import ServerTarget, TuningSpec

GIB = 2**30


def options(*arguments: str) -> TuneOptions:
    """What the command line is read as."""
    found: list[TuneOptions] = []

    @click.command()
    @tune_options
    def command(**values: Any) -> None:
        found.append(TuneOptions(**values))

    command.main(list(arguments), standalone_mode=False)
    return found[0]


def spec(*arguments: str) -> TuningSpec:
    return spec_of(options("--config", "llama-3.1-8b", *arguments))


def problems(*arguments: str) -> dict[str, str]:
    """Every violation, by its option."""
    with pytest.raises(InvalidInputError) as caught:
        spec_of(options(*arguments))
    return {violation.field: violation.description for violation in caught.value.violations}


@pytest.mark.parametrize(
    ("text", "byte_count"),
    [
        ("24GiB", 25_769_803_776),
        ("80GB", 80_000_000_000),
        ("300MB", 300_000_000),
        ("512 MiB", 536_870_912),
        ("1.5gib", 1_610_612_736),
        (".5GB", 500_000_000),
        ("1TiB", 1_099_511_627_776),
        ("7B", 7),
        ("0", 0),
    ],
)
def test_sizes(text: str, byte_count: int) -> None:
    assert SIZE.convert(text, None, None) == byte_count


@pytest.mark.parametrize("text", ["24", "24G", "24 GBit", "GiB", "-1GiB", "1e3GB", "24GiB!", "", "nan", "9999999TiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"is no size; write 24GiB|more than any GPU has"):
        SIZE.convert(text, None, None)


def test_where_nothing_is_said_the_defaults_are_those_of_the_service() -> None:
    """Llama-3.1's context of 131,072 is more than anybody's requests: 8,192, half of them new, 1,024 at most."""
    made = spec("--gpu-memory", "24GiB")
    assert (made.longest_sequence, made.most_new_tokens, made.most_requests) == (8192, 1024, 256)
    assert (made.probe, made.server, made.gpu_count) == (ProbeKind.ANALYTIC, Server.TGIS, 1)
    assert made.gpu_memory_bytes == 24 * GIB
    assert made.reserved_bytes == round(0.88 * GIB)
    assert made.precision == pytest.approx(0.01)
    assert made.llm_name == "meta-llama/Llama-3.1-8B"
    assert made.prefill_limit is None


def test_a_profile_says_memory_and_count() -> None:
    """CUDA reports 39.39 GiB of an A100-40GB; the all-reduce of two takes 0.57 GiB more of each."""
    made = spec("--gpu", "2xA100-40GB")
    assert (made.gpu_name, made.gpu_count) == ("A100-40GB", 2)
    assert made.gpu_memory_bytes == pytest.approx(39.39 * GIB, rel=1e-3)
    assert made.reserved_bytes - spec("--gpu", "1xA100-40GB").reserved_bytes == round(0.57 * GIB)


def test_of_a_cpu_nothing_is_set_aside() -> None:
    assert spec("--gpu-memory", "300MB", "--probe", "cpu").reserved_bytes == 0


def test_every_option_arrives() -> None:
    made = spec(
        *("--gpu-memory", "80GB", "--gpus", "4", "--reserve", "2GB", "--server", "vllm", "--probe", "dry"),
        *("--longest-sequence", "4096", "--max-new-tokens", "100", "--max-requests", "64", "--prefill-limit", "2048"),
        *("--prompt-logprobs", "--precision", "fp16", "--eager-attention", "--granule", "16"),
        *("--precision-percent", "0.5", "--step-seconds", "9", "--soak-steps", "7", "--seed", "3"),
    )
    assert (made.gpu_count, made.reserved_bytes, made.server, made.probe) == (4, 2 * 10**9, Server.VLLM, ProbeKind.DRY)
    assert (made.longest_sequence, made.most_new_tokens, made.most_requests) == (4096, 100, 64)
    assert (made.prefill_limit, made.prompt_logprobs, made.precision_name) == (2048, True, "fp16")
    assert (made.eager_attention, made.granule, made.precision) == (True, 16, 0.005)
    assert (made.step_seconds, made.soak_steps, made.seed) == (9, 7, 3)


def test_a_server_is_one_that_runs_or_a_command(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.touch()
    url = ("--gpu", "1xA100-40GB", "--probe", "server", "--url", "grpc://127.0.0.1:8033")
    assert spec(*url, "--server-log", str(log)).target == ServerTarget(url="grpc://127.0.0.1:8033", log_file=log)
    target = spec(*url, "--start", "serve 'a b' --max-batch-weight {weight}", "--start-seconds", "1800").target
    assert target is not None
    assert target.command == ("serve", "a b", "--max-batch-weight", "{weight}")
    assert target.start_seconds == 1800


def test_everything_wrong_is_told_at_once() -> None:
    found = problems("--url", "http://x:1", "--start", "serve", "--server-log", "log")
    assert found.keys() == {"--config", "--gpu-memory", "--url", "--start", "--server-log"}
    assert "1xA100-40GB" in found["--gpu-memory"]


PROBE = ("--gpu-memory", "9GB", "--probe", "server")


@pytest.mark.parametrize(
    ("arguments", "option", "said"),
    [
        (("--gpu", "1xA100-40GB", "--gpu-memory", "24GiB"), "--gpu-memory", "goes without --gpu"),
        (("--gpu", "1xA100-40GB", "--gpus", "2"), "--gpus", "goes without --gpu"),
        (("--gpu-memory", "0GiB"), "--gpu-memory", "must be > 0"),
        (("--gpu-memory", "9GB", "--probe", "server"), "--url", "is needed by --probe server"),
        (("--gpu-memory", "9GB", "--probe", "server", "--url", "localhost"), "--url", "http://HOST:8000"),
        ((*PROBE, "--url", "http://h:99999"), "--url", "http://HOST:8000"),
        ((*PROBE, "--url", "http://h:1", "--start-seconds", "9"), "--start-seconds", "goes with --start"),
        ((*PROBE, "--url", "http://h:1", "--server-log", "/no/log"), "--server-log", "cannot be read"),
        ((*PROBE, "--url", "http://h:1", "--start", "x", "--server-log", "/no/log"), "--server-log", "without --start"),
        (("--gpu-memory", "9GB", "--probe", "server", "--url", "http://h:1", "--start", "'"), "--start", "split"),
        (("--gpu-memory", "9GB", "--probe", "server", "--url", "http://h:1", "--start", ""), "--start", "is empty"),
    ],
)
def test_options_that_do_not_go_together(arguments: tuple[str, ...], option: str, said: str) -> None:
    found = problems("--config", "llama-3.1-8b", *arguments)
    assert list(found) == [option]
    assert said in found[option]


def write_config(folder: Path, **changed: object) -> Path:
    """A config.json in a folder."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": 1000,
        "torch_dtype": "bfloat16",
    } | changed
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize("form", [str, lambda folder: str(folder / "config.json")])
def test_a_config_is_a_file_or_the_folder_of_one(form: Callable[[Path], str], tmp_path: Path) -> None:
    folder = write_config(tmp_path / "tiny")
    made = spec_of(options("--config", form(folder), "--gpu-memory", "1GB"))
    assert (made.llm_name, made.longest_sequence, made.most_new_tokens) == ("tiny", 1000, 500)


def test_real_weights_bring_their_own_config(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "tiny")
    (folder / "model.safetensors").write_bytes(b"")
    made = spec_of(options("--model", str(folder), "--gpu-memory", "1GB", "--probe", "cpu"))
    assert (made.llm_name, made.model_folder) == ("tiny", folder)


def test_a_folder_without_weights_is_refused_where_real_ones_are_asked(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "tiny")
    found = problems("--model", str(folder), "--gpu-memory", "1GB", "--probe", "cpu")
    assert "has no weights (*.safetensors, *.bin)" in found["--model"]


def test_a_config_without_heads_is_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "tiny", num_attention_heads=None)
    assert "num_attention_heads" in " ".join(problems("--config", str(folder), "--gpu-memory", "1GB"))


def test_a_config_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    for llm in (str(tmp_path / "config.json"), str(tmp_path), "llama-3.1-8bb"):
        with pytest.raises(NotFoundError):
            spec_of(options("--config", llm, "--gpu-memory", "1GB"))


def test_a_config_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    assert "UTF-8" in problems("--config", str(tmp_path), "--gpu-memory", "1GB")["--config"]


def test_what_the_domain_finds_wrong_is_told_by_the_names_of_options() -> None:
    error = in_options(
        InvalidInputError(
            [
                Violation("limits.most_new_tokens", "must be < longest_sequence 10, is 11"),
                Violation("config_json.num_heads", "is missing"),
            ]
        )
    )
    assert list(map(str, error.violations)) == [
        "--max-new-tokens: must be < --longest-sequence 10, is 11",
        "config_json.num_heads: is missing",
    ]
