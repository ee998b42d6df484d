"""What is wrong with the requests of a spec.

Invariant: finds everything at once that can be told without asking the workload generator.
"""

import json
import math
import re
from collections.abc import Iterator

from llmpilot_contracts.errors import Violation
from llmpilot_loadtester.domain.spec import PromptRequests, Protocol, Requests, SyntheticRequests, WorkloadRequests

LARGEST_SEED = 2**64 - 1
LARGEST_TOKENS = 10_000_000
"""Longer requests are a mistake."""
MOST_LINE_VIOLATIONS = 20
VALUE_CHOICES = ("", "centre", "uniform", "quantiles")
_MODEL_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def request_violations(requests: Requests, protocol: Protocol) -> Iterator[Violation]:
    """Yield what is wrong with what is sent to a server that speaks a protocol."""
    match requests:
        case WorkloadRequests():
            yield from _workload_violations(requests)
        case PromptRequests():
            yield from whole_violations("spec.prompts.output_tokens", requests.output_tokens, 1, LARGEST_TOKENS)
            yield from _prompt_violations(requests.jsonl, protocol)
        case SyntheticRequests():
            yield from whole_violations("spec.synthetic.input_tokens", requests.input_tokens, 1, LARGEST_TOKENS)
            yield from whole_violations("spec.synthetic.output_tokens", requests.output_tokens, 1, LARGEST_TOKENS)
            yield from whole_violations("spec.synthetic.seed", requests.seed, 0, LARGEST_SEED)


def _workload_violations(requests: WorkloadRequests) -> Iterator[Violation]:
    field = "spec.workload"
    if not _MODEL_ID.fullmatch(requests.workload_model):
        yield Violation(
            f"{field}.sampling.workload_model",
            'must be the id of a model or profile: 1 to 63 lower-case letters, digits and "-", '
            f'not "-" at either end, is {shown(requests.workload_model)}',
        )
    yield from whole_violations(f"{field}.sampling.seed", requests.seed, 0, LARGEST_SEED)
    if requests.value_choice not in VALUE_CHOICES:
        choices = ", ".join(VALUE_CHOICES[1:])
        yield Violation(
            f"{field}.sampling.value_choice", f"must be {choices} or empty, is {shown(requests.value_choice)}"
        )
    for index, (parameter, factor) in enumerate(requests.scales):
        if not parameter:
            yield Violation(f"{field}.sampling.scales[{index}].parameter", "must not be empty")
        yield from positive_violations(f"{field}.sampling.scales[{index}].factor", factor)
    for index, condition in enumerate(requests.conditions):
        if not condition.strip():
            yield Violation(f"{field}.sampling.conditions[{index}]", "must not be empty")
    if requests.context_length < 0:
        yield Violation(f"{field}.sampling.context_length", f"must be >= 0, is {requests.context_length}")
    if not 0 <= requests.shared_prefix_ratio <= 1:
        yield Violation(f"{field}.shared_prefix_ratio", f"must be from 0 to 1, is {requests.shared_prefix_ratio:g}")
    if requests.prefix_group_count < 0:
        yield Violation(f"{field}.prefix_group_count", f"must be >= 0, is {requests.prefix_group_count}")
    yield from tokenizer_violations(f"{field}.tokenizer_json", requests.tokenizer_json)


def _prompt_violations(jsonl: bytes, protocol: Protocol) -> Iterator[Violation]:
    field = "spec.prompts.jsonl"
    prompt_count = wrong_count = 0
    for number, line in enumerate(jsonl.split(b"\n"), start=1):
        if not line.strip():
            continue
        prompt_count += 1
        problem = _line_problem(line, protocol)
        if problem and wrong_count < MOST_LINE_VIOLATIONS:
            yield Violation(field, f"line {number}: {problem}")
        wrong_count += bool(problem)
    if wrong_count > MOST_LINE_VIOLATIONS:
        yield Violation(field, f"{wrong_count - MOST_LINE_VIOLATIONS} more lines are wrong")
    if not prompt_count:
        yield Violation(field, 'must have at least one line, e.g. {"prompt": "Why is the sky blue?"}')


def _line_problem(line: bytes, protocol: Protocol) -> str | None:
    try:
        content = json.loads(line)
        if b"\\ud" in line.lower():
            json.dumps(content, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        return f"must be JSON: {error.msg} at character {error.pos + 1}"
    except (UnicodeError, RecursionError) as error:
        return f"must be JSON: {error}"
    return _prompt_problem(content, protocol) if isinstance(content, dict) else "must be a JSON object"


def _prompt_problem(content: dict[str, object], protocol: Protocol) -> str | None:
    if ("prompt" in content) == ("body" in content):
        return 'must have either "prompt" or "body"'
    if "body" in content and protocol is Protocol.TGIS:
        return 'must have a "prompt": requests of tgis are no JSON'
    if not isinstance(content.get("body", {}), dict):
        return '"body" must be a JSON object'
    prompt = content.get("prompt", "-")
    if not isinstance(prompt, str) or not prompt:
        return '"prompt" must be a text that is not empty'
    for name in ("output_tokens", "input_tokens"):
        value = content.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= LARGEST_TOKENS):
            return f'"{name}" must be a whole number from 1 to {LARGEST_TOKENS:,}, is {shown(value)}'
    return None


def tokenizer_violations(field: str, content: bytes) -> Iterator[Violation]:
    """Yield what is wrong with a tokenizer.json; empty is none."""
    if not content:
        return
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        yield Violation(field, "must be the content of a tokenizer.json, is no JSON")
        return
    if not isinstance(parsed, dict) or "model" not in parsed:
        yield Violation(field, 'must be the content of a tokenizer.json, has no "model"')


def whole_violations(field: str, value: int, least: int, most: int) -> Iterator[Violation]:
    """Yield that a whole number is out of its range."""
    if value < least:
        yield Violation(field, f"must be >= {least}, is {value}")
    elif value > most:
        yield Violation(field, f"must be at most {most:,}, is {value:,}")


def positive_violations(field: str, value: float, *, most: float = math.inf) -> Iterator[Violation]:
    """Yield that a number is not finite and > 0, or too large."""
    if not 0 < value < math.inf:
        yield Violation(field, f"must be > 0, is {value:g}")
    elif value > most:
        yield Violation(field, f"must be at most {most:,.15g}, is {value:,.15g}")


def shown(value: object) -> str:
    """Return what was given, shortened."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."  # noqa: PLR2004 fits into a line
