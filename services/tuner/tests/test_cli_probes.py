"""`llm-pilot tune` with the LLM itself: real weights from a folder, and ranks of two processes."""

import json
import runpy
from pathlib import Path

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch", reason="the extra llm-pilot-tuner[torch] is not installed")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from llmpilot_console.cli import pilot  # noqa: E402
from llmpilot_tuner.outputs.report import read_report  # noqa: E402

_TINY = runpy.run_path(str(Path(__file__).with_name("tiny_llms.py")))
SMALL = ("--probe", "cpu", "--longest-sequence", "128", "--max-requests", "8", "--soak-steps", "2")


def saved(folder: Path) -> int:
    """Save a model as its makers do; returns the bytes of its tensors."""
    config = json.loads(_TINY["TINY_LLMS"]["llama-gqa"])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def test_real_weights_of_a_folder_are_tuned_with(tmp_path: Path) -> None:
    weight_bytes = saved(tmp_path / "llm")
    report = tmp_path / "report.json"
    arguments = ("--model", str(tmp_path / "llm"), "--gpu-memory", "100MB", "--precision", "fp32", *SMALL)
    result = CliRunner().invoke(pilot, ["tune", *arguments, "--report", str(report)])
    assert result.exit_code == 0, result.output
    found = read_report(report.read_bytes())
    assert found.max_batch_weight == 8 * 128
    assert found.memory.llm_weights_bytes == weight_bytes
    assert "measured on the CPU" in result.stdout


def test_two_ranks_hold_the_weights_of_the_precision_that_is_served(tmp_path: Path) -> None:
    """In fp16 T5's second feed-forward matrices stay in 32 bits, though this config.json says bfloat16."""
    (tmp_path / "config.json").write_text(_TINY["tiny_llm"]("t5", torch_dtype="bfloat16"))
    report = tmp_path / "report.json"
    arguments = ("--config", str(tmp_path), "--gpus", "2", "--gpu-memory", "30MB", "--precision", "fp16", *SMALL)
    result = CliRunner().invoke(pilot, ["tune", *arguments, "--report", str(report)])
    assert result.exit_code == 0, result.output
    layers, width, inner, vocabulary, heads, buckets = 3, 128, 320, 2048, 8, 32
    attention, norms = 4 * width * width, width
    encoder = layers * (attention + 2 * width * inner + 2 * norms) + norms
    decoder = layers * (2 * attention + 2 * width * inner + 3 * norms) + norms
    shared = 2 * vocabulary * width + 2 * buckets * heads
    norms_of_all = (2 * layers + 1 + 3 * layers + 1) * norms
    in_16_bits = (encoder + decoder + shared - norms_of_all) // 2 + norms_of_all
    in_32_bits = 2 * layers * inner * width // 2
    assert read_report(report.read_bytes()).memory.llm_weights_bytes == 2 * in_16_bits + 4 * in_32_bits
