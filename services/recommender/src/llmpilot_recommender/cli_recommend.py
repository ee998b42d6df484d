"""`llm-pilot recommend` and `llm-pilot predict`: questions to a recommender, over gRPC like anybody else's."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from google.protobuf import json_format
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from llmpilot.catalog.v1.llm_pb2 import Llm
from llmpilot.recommendation.v1 import recommendation_pb2 as pb
from llmpilot.recommendation.v1.recommendation_pb2_grpc import RecommendationServiceStub
from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.prices import read_prices
from llmpilot_servicekit.client import connect
from llmpilot_servicekit.platform import Platform

DEADLINE_SECONDS = 30.0
WIDTH_OFF_TERMINAL = 160
LARGEST_PATH_SHOWN = 200

_config_option = click.option(
    "--config",
    required=True,
    metavar="PATH",
    help="A Hugging Face config.json, a folder that holds one, or the name of a bundled or measured LLM.",
)
_name_option = click.option(
    "--name", default="", help="Name of the LLM of a config.json; measurements under this name win over predictions."
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")


@click.command()
@_config_option
@_name_option
@click.option("--users", required=True, type=int, help="Concurrent users of the whole service.")
@click.option("--nttft-ms", required=True, type=float, help="Largest median time to first token per input token.")
@click.option("--itl-ms", required=True, type=float, help="Largest median inter-token latency.")
@click.option("--error-rate", type=float, help="Largest share of failed requests where measured.  [default: 0.01]")
@click.option(
    "--candidate",
    "candidates",
    multiple=True,
    metavar="PROFILE",
    help="A GPU profile to consider, e.g. 2xA100-40GB; repeatable; `all` for the whole catalogue."
    "  [default: the characterized ones]",
)
@click.option("--prices", type=click.Path(path_type=Path), help="CSV file: gpu_profile,price_per_hour.")
@_json_option
@click.pass_obj
def recommend(
    platform: Platform,
    *,
    config: str,
    name: str,
    users: int,
    nttft_ms: float,
    itl_ms: float,
    error_rate: float | None,
    candidates: tuple[str, ...],
    prices: Path | None,
    as_json: bool,
) -> None:
    """Recommend the cheapest GPU profile and number of pods that serve an LLM within latency limits."""
    request = pb.RecommendRequest(
        llm=_llm(config, name),
        limits=pb.LatencyLimits(nttft_ms=nttft_ms, itl_ms=itl_ms, error_rate=error_rate),
        users_count=_int64("--users", users),
        prices=_prices(prices) if prices else (),
    )
    if candidates == ("all",):
        request.all_gpu_profiles = True
    elif "all" in candidates:
        raise InvalidInputError([Violation("--candidate", "`all` goes alone; leave the other profiles out")])
    elif candidates:
        request.gpu_profiles.names.extend(candidates)
    with _stub(platform) as stub:
        answer = stub.Recommend(request, timeout=DEADLINE_SECONDS)
    if as_json:
        _print_json(answer)
    else:
        _print_answer(answer, request, config)


@click.command()
@_config_option
@_name_option
@click.option("--gpu-profile", required=True, help="GPU profile, e.g. 2xA100-40GB.")
@_json_option
@click.pass_obj
def predict(platform: Platform, *, config: str, name: str, gpu_profile: str, as_json: bool) -> None:
    """Show the latencies of an LLM on one GPU profile over concurrent users."""
    with _stub(platform) as stub:
        answer = stub.Predict(
            pb.PredictRequest(llm=_llm(config, name), gpu_profile=gpu_profile), timeout=DEADLINE_SECONDS
        )
    if as_json:
        _print_json(answer)
        return
    table = Table("users per pod", "nTTFT ms/token", "ITL ms", "failed", "basis", title=f"{config} on {gpu_profile}")
    for point in answer.points:
        table.add_row(
            str(point.users_count),
            _number(point.nttft_ms) if point.HasField("nttft_ms") else "-",
            _number(point.itl_ms) if point.HasField("itl_ms") else "-",
            f"{point.error_rate:.1%}" if point.HasField("error_rate") else "-",
            _basis(point.basis),
        )
    console = _console()
    console.print(table)
    if not answer.fits_in_memory:
        console.print("The weights do not fit into this profile's memory.")
    console.print(f"model {answer.model}, dataset {answer.dataset_version}", highlight=False)


@contextmanager
def _stub(platform: Platform) -> Iterator[RecommendationServiceStub]:
    with platform.address_of("recommender") as address, connect(address) as channel:
        yield RecommendationServiceStub(channel)


def _llm(config: str, name: str) -> Llm:
    path = Path(config)
    try:
        if path.is_dir():
            path /= "config.json"
        if path.suffix == ".json" or path.is_file():
            return Llm(name=name, config_json=path.read_text(encoding="utf-8"))
    except OSError as error:
        problem = f"{str(path)[:LARGEST_PATH_SHOWN]} cannot be read: {error.strerror}"
        raise InvalidInputError([Violation("--config", problem)]) from error
    except UnicodeDecodeError as error:
        raise InvalidInputError([Violation("--config", f"{path} is not UTF-8 text")]) from error
    if name:
        raise InvalidInputError([Violation("--name", "goes with the path of a config.json")])
    return Llm(name=config)


def _int64(option: str, value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise InvalidInputError([Violation(option, f"is no 64-bit number: {value}")])
    return value


def _prices(path: Path) -> list[pb.Price]:
    return [
        pb.Price(gpu_profile=name, price_per_hour=price.price_per_hour) for name, price in read_prices(path).items()
    ]


def _console() -> Console:
    width = None if sys.stdout.isatty() else WIDTH_OFF_TERMINAL
    return Console(width=width, markup=False, emoji=False)  # names are the user's


def _print_json(message: Message) -> None:
    click.echo(json_format.MessageToJson(message, always_print_fields_with_no_presence=True))


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"  # noqa: PLR2004 three digits


def _basis(basis: "pb.Basis.ValueType") -> str:
    return pb.Basis.Name(basis).removeprefix("BASIS_").lower()


def _print_answer(answer: pb.RecommendResponse, request: pb.RecommendRequest, config: str) -> None:
    console = _console()
    console.print(
        f"{request.llm.name or config} ({answer.llm_spec.parameter_count / 1e9:.3g}B parameters),"
        f" {request.users_count} users, nTTFT <= {request.limits.nttft_ms:g} ms, ITL <= {request.limits.itl_ms:g} ms",
        highlight=False,
    )
    console.print(_answer_table(answer))
    console.print(answer.summary, style="bold", highlight=False)
    for note in answer.notes:
        console.print(f"note: {note}", highlight=False)
    console.print(f"model {answer.model}, dataset {answer.dataset_version}", highlight=False)


def _answer_table(answer: pb.RecommendResponse) -> Table:
    table = Table("GPU profile")
    for title in ("pods", "price/h", "users/pod", "nTTFT ms", "ITL ms"):
        table.add_column(title, justify="right")
    table.add_column("verdict")
    table.add_column("why", overflow="fold")
    for index, option in enumerate(answer.options):
        table.add_row(
            option.gpu_profile,
            str(option.pod_count),
            f"{option.price_per_hour:.2f}",
            str(option.users_per_pod),
            _number(option.nttft_ms),
            _number(option.itl_ms),
            f"{'cheapest' if index == 0 else 'meets the limits'}, {_basis(option.basis)}",
            option.reason,
            style="bold green" if index == 0 else None,
        )
    for rejection in answer.rejections:
        reason = pb.RejectionReason.Name(rejection.reason).removeprefix("REJECTION_REASON_")
        verdict = f"no: {reason.replace('_', ' ').lower()}"
        table.add_row(rejection.gpu_profile, *[""] * 5, verdict, rejection.detail, style="dim")
    return table
