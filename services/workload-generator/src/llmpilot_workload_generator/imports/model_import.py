"""Models that others published, read into models of this service.

Invariant: what is published is kept exactly, and nothing that a file asks for is run.
"""

from pathlib import Path

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.files.model_file import is_model, read_file
from llmpilot_workload_generator.imports.fmperf_model import read_fmperf
from llmpilot_workload_generator.imports.length_cdf import read_length_cdf
from llmpilot_workload_generator.model import WorkloadModel

_PICKLE_PROTOCOL = 0x80
"""The first byte of a pickle of protocol 2 and later."""


def import_model(path: Path, *, use_case: str | None = None, command: str = "") -> WorkloadModel:
    """Return the model in a file: the pickle published with fmperf, or a CSV of length distributions.

    use_case: which one of a file of several; command: what the model's provenance says made it.
    Raises InvalidInputError where the file is neither, NotFoundError where there is none.
    """
    content = read_file(path, "published model")
    return import_bytes(content, label=path.name, use_case=use_case, command=command)


def import_bytes(content: bytes, *, label: str, use_case: str | None = None, command: str = "") -> WorkloadModel:
    """Return the model in a file's content; `label` is what errors call the file."""
    if is_model(content):
        raise InvalidInputError([Violation(label, "is a model file already; nothing is to be imported")])
    if content[:1] != bytes([_PICKLE_PROTOCOL]):
        return read_length_cdf(content, label=label, use_case=use_case, command=command)
    if use_case is not None:
        raise InvalidInputError([Violation("use_case", "goes with a CSV of length distributions, this is a pickle")])
    return read_fmperf(content, label=label, command=command)
