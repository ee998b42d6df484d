"""The file that a server is started with."""

import subprocess
from pathlib import Path

import pytest

from llmpilot_tuner.domain.limits import Limits
from llmpilot_tuner.domain.servers import TGI, TGIS_FLASH, TGIS_PADDED, VLLM, ServerRules
from llmpilot_tuner.outputs.server_settings import environment_file, server_settings, vllm_arguments


def limits(rules: ServerRules, prefill_limit: int | None = 4096) -> Limits:
    return Limits(
        rules=rules, longest_sequence=2048, most_new_tokens=512, most_requests=128, prefill_limit=prefill_limit
    )


def sourced(text: str, folder: Path) -> dict[str, str]:
    """What a process that a shell starts after reading the file has in its environment."""
    file = folder / "server.env"
    file.write_text(text)
    command = ["sh", "-c", "set -eu; set -a; . ./server.env; set +a; exec env -0"]
    told = subprocess.run(command, cwd=folder, env={}, capture_output=True, check=True, timeout=20).stdout.decode()
    pairs = dict(line.split("=", 1) for line in told.split("\0") if line)
    return {name: value for name, value in pairs.items() if name not in {"PWD", "OLDPWD", "SHLVL", "_", "PATH"}}


EXPECTED = {
    "tgis": (
        TGIS_FLASH,
        {
            "LLMPILOT_MAX_BATCH_WEIGHT": "98765",
            "MAX_BATCH_WEIGHT": "98765",
            "MAX_PREFILL_WEIGHT": "4096",
            "MAX_BATCH_SIZE": "128",
            "MAX_SEQUENCE_LENGTH": "2048",
            "MAX_NEW_TOKENS": "512",
            "MAX_CONCURRENT_REQUESTS": "512",
            "NUM_SHARD": "2",
        },
    ),
    "tgi": (
        TGI,
        {
            "LLMPILOT_MAX_BATCH_WEIGHT": "98765",
            "MAX_BATCH_TOTAL_TOKENS": "98765",
            "MAX_BATCH_PREFILL_TOKENS": "4096",
            "MAX_TOTAL_TOKENS": "2048",
            "MAX_INPUT_TOKENS": "2047",
            "MAX_BATCH_SIZE": "128",
            "NUM_SHARD": "2",
        },
    ),
    "vllm": (
        VLLM,
        {
            "LLMPILOT_MAX_BATCH_WEIGHT": "98765",
            "LLMPILOT_VLLM_ARGS": (
                "--max-model-len=2048 --max-num-seqs=128 --max-num-batched-tokens=4096 --block-size=16 "
                "--num-gpu-blocks-override=6172 --tensor-parallel-size=2"
            ),
            "LLMPILOT_VLLM_MAX_MODEL_LEN": "2048",
            "LLMPILOT_VLLM_MAX_NUM_SEQS": "128",
            "LLMPILOT_VLLM_MAX_NUM_BATCHED_TOKENS": "4096",
            "LLMPILOT_VLLM_BLOCK_SIZE": "16",
            "LLMPILOT_VLLM_NUM_GPU_BLOCKS_OVERRIDE": "6172",
            "LLMPILOT_VLLM_TENSOR_PARALLEL_SIZE": "2",
        },
    ),
}


@pytest.mark.parametrize("server", EXPECTED)
def test_a_shell_that_reads_the_file_has_the_settings(server: str, tmp_path: Path) -> None:
    """6,172 blocks of 16 tokens are the most within 98,765."""
    rules, expected = EXPECTED[server]
    assert sourced(environment_file(limits(rules), 98_765, gpu_count=2, facts="found"), tmp_path) == expected


def test_the_arguments_of_vllm_are_words_of_a_shell(tmp_path: Path) -> None:
    (tmp_path / "server.env").write_text(environment_file(limits(VLLM), 98_765))
    command = ["sh", "-c", r'. ./server.env; printf "%s\n" $LLMPILOT_VLLM_ARGS']
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, timeout=20, text=True).stdout
    assert tuple(told.split()) == vllm_arguments(limits(VLLM), 98_765)


@pytest.mark.parametrize(
    "evil", ["x\nMAX_BATCH_WEIGHT=1", "x\r\nMAX_BATCH_WEIGHT=1", "$(touch hacked)", "`touch hacked`"]
)
def test_no_name_of_an_llm_becomes_a_setting_or_a_command(evil: str, tmp_path: Path) -> None:
    settings = sourced(environment_file(limits(TGIS_FLASH), 5000, facts=evil), tmp_path)
    assert settings["MAX_BATCH_WEIGHT"] == "5000"
    assert not (tmp_path / "hacked").exists()


def test_a_padding_server_gets_its_own_weights() -> None:
    """They are not tokens: n times the square of the longest."""
    settings = server_settings(limits(TGIS_PADDED, prefill_limit=300_000), 34_543_200)
    assert (settings["MAX_BATCH_WEIGHT"], settings["MAX_PREFILL_WEIGHT"]) == ("34543200", "300000")


def test_tgi_is_not_asked_for_a_prefill_larger_than_the_batch() -> None:
    """It would refuse to start."""
    assert server_settings(limits(TGI), 3000)["MAX_BATCH_PREFILL_TOKENS"] == "3000"
    assert server_settings(limits(TGI, None), 3000)["MAX_BATCH_PREFILL_TOKENS"] == "3000"
