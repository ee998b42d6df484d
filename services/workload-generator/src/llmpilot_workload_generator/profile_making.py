"""Makes the profiles of public data: `python -m llmpilot_workload_generator.profile_making DATA [OUT]`.

DATA is a folder as ../shared/data; OUT is where the files go, by default where the package has them.
Invariant: the same data makes the same models, so what ships can be checked.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from llmpilot_workload_generator.files.model_file import write_model
from llmpilot_workload_generator.fitting.fit import FitOptions, fit
from llmpilot_workload_generator.imports.model_import import import_model
from llmpilot_workload_generator.model import ArrivalKind, Arrivals, Floats, WorkloadModel
from llmpilot_workload_generator.profiles import FOLDER, PROFILE_NAMES, profile_path
from llmpilot_workload_generator.traces.reader import open_trace
from llmpilot_workload_generator.traces.trace import Trace

COMMAND = "python -m llmpilot_workload_generator.profile_making DATA"
LENGTHS = Path("workload-choice") / "token_length_cdf.csv"
POISSON = Arrivals(kind=ArrivalKind.POISSON, rate_per_second=1.0)
"""Where nobody recorded arrivals."""


def make_profile(name: str, data: Path) -> WorkloadModel:
    """Make a profile of the files in a folder of public data; raises KeyError for a name that is none."""
    return _MAKERS[name](data)


def recorded_arrivals(trace: Trace, kind: ArrivalKind) -> Arrivals:
    """Return an arrival process with a trace's mean rate and, if it is of that kind, its burstiness."""
    times = [batch.arrival_nanos for batch in trace.batches() if batch.arrival_nanos is not None]
    gaps: Floats = np.diff(np.sort(np.concatenate(times))).astype(np.float64) / 1e9
    rate = float(1 / gaps.mean())
    if kind is not ArrivalKind.GAMMA:
        return Arrivals(kind=kind, rate_per_second=_rounded(rate))
    return Arrivals(kind=kind, rate_per_second=_rounded(rate), burstiness=_rounded(gamma_shape(gaps)))


def gamma_shape(gaps: Floats) -> float:
    """Return the most likely shape of the gamma distribution of gaps, all > 0.

    Choi and Wette, 1969, within 1.5 %. The moments' 1 / CV^2 would describe the few longest pauses and nothing else.
    """
    spread = float(np.log(gaps.mean()) - np.log(gaps).mean())
    return float((3 - spread + np.sqrt((spread - 3) ** 2 + 24 * spread)) / (12 * spread))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _production(data: Path) -> WorkloadModel:
    return import_model(data / "fmperf" / "all_nbins_64.pkl", command=COMMAND)


def _lengths(use_case: str) -> Callable[[Path], WorkloadModel]:
    def make(data: Path) -> WorkloadModel:
        return replace(import_model(data / LENGTHS, use_case=use_case, command=COMMAND), arrivals=POISSON)

    return make


def _trace(file: str, kind: ArrivalKind, source: str, licence: str) -> Callable[[Path], WorkloadModel]:
    def make(data: Path) -> WorkloadModel:
        trace = open_trace(data / "traces" / file)
        arrivals = recorded_arrivals(trace, kind)
        return fit(trace, FitOptions(source=source, licence=licence, command=COMMAND, arrivals=arrivals))

    return make


_AZURE = "Azure LLM inference trace 2023, {} (Patel et al., ISCA '24)"
_AZURE_LICENCE = "CC-BY-4.0, Microsoft"
_MAKERS: Mapping[str, Callable[[Path], WorkloadModel]] = {
    "production": _production,
    "code": _trace("azure_2023_code.csv", ArrivalKind.GAMMA, _AZURE.format("code"), _AZURE_LICENCE),
    "conversation": _trace("azure_2023_conv.csv", ArrivalKind.GAMMA, _AZURE.format("conversation"), _AZURE_LICENCE),
    "summarization": _lengths("cnn"),
    "question-answering": _lengths("dolly"),
    "text-generation": _lengths("alpaca"),
    "long-context": _trace(
        "mooncake_conversation.jsonl",
        ArrivalKind.POISSON,  # its times are rounded to about 3 s, so its gaps say nothing
        "Mooncake conversation trace (Qin et al., FAST '25)",
        "Apache-2.0",
    ),
}


def main() -> None:
    """Make all profiles."""
    parser = argparse.ArgumentParser(description="Make the profiles of public data.")
    parser.add_argument("data", type=Path, help="folder of public data")
    parser.add_argument("out", type=Path, nargs="?", default=FOLDER, help="folder for the model files")
    arguments = parser.parse_args()
    for name in PROFILE_NAMES:
        write_model(profile_path(name, arguments.out), make_profile(name, arguments.data))


if __name__ == "__main__":
    main()
