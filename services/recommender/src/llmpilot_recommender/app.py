"""The recommender's composition root: what it knows at start, and how it learns more while running."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from prometheus_client import CollectorRegistry

from llmpilot_contracts.errors import InvalidInputError, NotFoundError, Violation
from llmpilot_contracts.subjects import MEASUREMENT_RECORDED, STREAMS
from llmpilot_perfmodel.gpu_catalogue import load_catalogue
from llmpilot_perfmodel.prices import load_prices
from llmpilot_recommender.dataset import Dataset
from llmpilot_recommender.dataset_file import read_dataset
from llmpilot_recommender.knowledge import Knowledge
from llmpilot_recommender.measured_llms import load_measured_llms
from llmpilot_recommender.model_store import load_predictor
from llmpilot_recommender.servicer import RecommendationServicer
from llmpilot_recommender.settings import RecommenderSettings
from llmpilot_servicekit.logs import get_logger
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_servicekit.server import serve

T = TypeVar("T")


def load_knowledge(settings: RecommenderSettings) -> Knowledge:
    """Read dataset, model, catalogue and prices; raises InvalidInputError with the problems of all of them."""
    violations: list[Violation] = []
    model = _read(lambda: load_predictor(settings.model), violations)
    dataset = _read(lambda: Dataset(read_dataset(settings.dataset).measurements), violations)
    catalogue = _read(lambda: load_catalogue(settings.gpus), violations)
    prices = _read(lambda: load_prices(settings.prices), violations)
    if model is None or dataset is None or catalogue is None or prices is None:
        raise InvalidInputError(violations)
    manifest, predictor = model
    return Knowledge(
        dataset=dataset,
        llms=load_measured_llms(),
        catalogue=catalogue,
        prices=prices,
        predictor=predictor,
        manifest=manifest,
    )


def _read(load: Callable[[], T], violations: list[Violation]) -> T | None:
    try:
        return load()
    except InvalidInputError as error:
        violations.extend(error.violations)
    except NotFoundError as error:
        violations.append(Violation(error.kind, f"{error.name} does not exist"))
    return None


async def run(settings: RecommenderSettings) -> None:
    """Serve until told to stop. NATS may come and go: recommendations go on without it."""
    registry = CollectorRegistry()
    servicer = RecommendationServicer(load_knowledge(settings))
    nats = NatsConnection(settings.nats_url, streams=STREAMS, registry=registry)
    get_logger("recommender").info("knowledge loaded", **servicer.facts())
    await serve(
        settings,
        registrations=[servicer.registration()],
        background=[nats.run, partial(nats.follow, MEASUREMENT_RECORDED, servicer.learn)],
        registry=registry,
    )
