"""Prints how far simulated load tests are from the public measurements, by what the simulation was told.

    python benchmarks/simulator_accuracy.py [--roofline-out FILE]

Each line is the mean absolute error in percent over load tests that nothing was fitted on: medians over requests of
TTFT and nTTFT, the median over tokens of ITL, and tokens per second. Levels in which 1 % or more of the requests failed
are left out. `--roofline-out` also writes the table of roofline factors, fitted on data/step_constants.csv.
"""

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path

from llmpilot_perfmodel.gpu_catalogue import load_catalogue
from llmpilot_perfmodel.llm_config import parse_llm
from llmpilot_perfmodel.precision import precision_named
from llmpilot_perfmodel.sizes import llm_work
from llmpilot_perfmodel.steps.calibration import StepPrior
from llmpilot_perfmodel.steps.fitted import bundled_constants, measured_name
from llmpilot_perfmodel.steps.roofline import (
    MeasuredConstants,
    ServerKind,
    fit_factors,
    kind_of,
    priors_from_others,
    roofline_constants,
    with_uncertainty,
    write_factors,
)
from llmpilot_recommender.calibration_source import load_tests
from llmpilot_recommender.raw_source import PROVENANCE
from llmpilot_recommender.replay import FixedList
from llmpilot_recommender.replay_accuracy import (
    MeasuredServer,
    ReplayError,
    errors_after_calibration,
    errors_with,
    mean_absolute_percent,
    mean_percent,
    measured_servers,
)

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("LLMPILOT_DATA", ROOT.parent / "shared" / "data"))
ARCHIVE = DATA / "llm-pilot" / "performance_characterization_data_raw.tar.xz"
CONFIGS = ROOT / "libs" / "perfmodel" / "tests" / "data" / "known_llms.json"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--roofline-out", type=Path)
    roofline_out = parser.parse_args().roofline_out
    measured = measured_constants()
    if roofline_out:
        command = "python benchmarks/simulator_accuracy.py --roofline-out FILE"
        kinds = by_kind(measured.values())
        flash = with_uncertainty(kinds[ServerKind.FLASH])
        factors = {kind: with_uncertainty(of_kind, otherwise=flash) for kind, of_kind in kinds.items()}
        roofline_out.write_text(write_factors(factors, {**PROVENANCE, "command": command}))
    tests = list(load_tests(ARCHIVE))
    servers, requests = measured_servers(tests), FixedList.of(tests)
    print(f"{'fitted on':<22} {'tested on':<28} {'tests':>5}  throughput  TTFT nTTFT   ITL | mean error of throughput")
    for fitted_users in ((8,), (8, 64), (1, 2, 4, 8, 16, 32, 64)):
        for name, chosen in groups(servers).items():
            errors = [e for s in chosen for e in errors_after_calibration(s, requests, fitted_users=fitted_users)]
            show(f"users {', '.join(map(str, fitted_users))}", name, errors)
            if fitted_users == (8,):
                known = priors_of(chosen, measured)
                errors = [
                    e
                    for s in chosen
                    for e in errors_after_calibration(
                        s, requests, fitted_users=fitted_users, prior=known.get((s.llm, s.gpu_profile))
                    )
                ]
                show("  and other LLMs", name, errors)
                for users in sorted({error.users_count for error in errors}):
                    show("", f"  {users} users", [error for error in errors if error.users_count == users])
    for name, chosen in groups(servers).items():
        show("roofline, other LLMs", name, [e for s in chosen for e in unmeasured(s, requests, measured)])


def groups(servers: Iterable[MeasuredServer]) -> dict[str, list[MeasuredServer]]:
    """Return the servers by what they have in common."""
    names = ("flash decoders", "padded decoders", "all decoders", "encoder-decoders")
    of: dict[str, list[MeasuredServer]] = {name: [] for name in names}
    for server in servers:
        if server.llm.startswith(("google/", "bigscience/")):
            of["encoder-decoders"].append(server)
        else:
            of[names[server.is_padded]].append(server)
            of["all decoders"].append(server)
    return of


def show(fitted_on: str, tested_on: str, errors: list[ReplayError]) -> None:
    """Print one line."""
    if errors:
        mean, bias = mean_absolute_percent(errors), mean_percent(errors)
        print(
            f"{fitted_on:<22} {tested_on:<28} {len(errors):>5}  {mean['throughput_tokens_per_second']:10.1f} "
            f"{mean['ttft_ms']:5.1f} {mean['nttft_ms']:5.1f} {mean['itl_ms']:5.1f} | "
            f"{bias['throughput_tokens_per_second']:+.1f}"
        )


def measured_constants() -> dict[tuple[str, str], MeasuredConstants]:
    """Return the bundled constants with the sizes of their LLMs, served in 16 bits."""
    configs = {measured_name(name): known["config"] for name, known in json.loads(CONFIGS.read_text()).items()}
    catalogue = load_catalogue()
    samples = {}
    for (llm, profile_name), fitted in bundled_constants().items():
        profile = catalogue.require(profile_name)
        work = llm_work(parse_llm(json.dumps(configs[llm])), profile.gpu_count, precision_named("fp16"))
        samples[llm, profile_name] = MeasuredConstants(llm=llm, work=work, profile=profile, constants=fitted.constants)
    return samples


def by_kind(samples: Iterable[MeasuredConstants]) -> dict[ServerKind, list[MeasuredConstants]]:
    """Group servers by what their factors are fitted on together."""
    samples = list(samples)
    return {kind: [sample for sample in samples if kind_of(sample.work) is kind] for kind in ServerKind}


def priors_of(
    servers: Iterable[MeasuredServer], measured: dict[tuple[str, str], MeasuredConstants]
) -> dict[tuple[str, str], StepPrior]:
    """Return what the others of its kind say of each flash decoder and encoder-decoder; padded decoders are too few."""
    kinds = by_kind(measured[server.llm, server.gpu_profile] for server in servers)
    known = (kinds[ServerKind.FLASH], kinds[ServerKind.ENCODER_DECODER])
    return {key: prior for samples in known if samples for key, prior in priors_from_others(samples).items()}


def unmeasured(
    server: MeasuredServer, requests: FixedList, measured: dict[tuple[str, str], MeasuredConstants]
) -> list[ReplayError]:
    """Return the errors with constants from the LLM's sizes and factors fitted on the other LLMs of its kind."""
    sample = measured[server.llm, server.gpu_profile]
    others = [s for s in by_kind(measured.values())[kind_of(sample.work)] if s.llm != server.llm]
    constants = roofline_constants(sample.work, sample.profile, fit_factors(others))
    known = [server.tests[users] for users in server.clean_users]
    return errors_with(server, requests, constants, known=known, tested_users=server.clean_users) if known else []


if __name__ == "__main__":
    main()
