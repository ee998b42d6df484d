"""The edges file: where the bins of each parameter begin, in JSON, so that fits on many machines can be added up.

Invariant: what `write_edges` wrote, `read_edges` returns exactly.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_servicekit.file_output import write_whole
from llmpilot_workload_generator.files.model_file import is_model, model_from_bytes, read_file
from llmpilot_workload_generator.files.model_header import BinsForm, Form, bins_form, bins_problems, form_violations
from llmpilot_workload_generator.model import LARGEST_KEY_BITS, Bins

FORMAT = "llm-pilot workload edges"
VERSION = 1


class EdgesForm(Form):
    """The content of the file."""

    format: Literal["llm-pilot workload edges"] = "llm-pilot workload edges"
    version: Literal[1] = 1
    parameters: Annotated[list[BinsForm], Field(min_length=1, max_length=LARGEST_KEY_BITS)]


def read_edges(path: Path) -> tuple[Bins, ...]:
    """Return the bins of every parameter in an edges file or a model file.

    Raises InvalidInputError that lists what is wrong, NotFoundError where there is no file.
    """
    content = read_file(path, "edges file")
    if is_model(content):
        return tuple(parameter.bins for parameter in model_from_bytes(content, label=path.name).parameters)
    _check_version(content, path.name)
    try:
        form = EdgesForm.model_validate_json(content)
    except ValidationError as error:
        raise InvalidInputError(form_violations(error, path.name)) from error
    if problems := list(bins_problems(form.parameters)):
        raise InvalidInputError(Violation(path.name, problem) for problem in problems)
    return tuple(bins.to_bins() for bins in form.parameters)


def write_edges(path: Path, bins: tuple[Bins, ...]) -> None:
    """Write an edges file, all of it or nothing."""
    form = EdgesForm(parameters=[bins_form(one) for one in bins])
    write_whole(path, form.model_dump_json(indent=1).encode() + b"\n")


def _check_version(content: bytes, label: str) -> None:
    """Say which file this is before saying what is wrong in it."""
    try:
        found = json.loads(content)
    except (RecursionError, ValueError) as error:
        raise InvalidInputError([Violation(label, f"must be an edges file, which is JSON: {error}")]) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InvalidInputError([Violation(label, f'must be an edges file, whose "format" is "{FORMAT}"')])
    if (version := found.get("version")) != VERSION:
        problem = f"has version {version!r} of the format, this program reads version {VERSION}; find the edges again"
        raise InvalidInputError([Violation(label, problem)])
