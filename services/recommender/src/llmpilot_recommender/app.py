"""The recommender's composition root: what it knows at start, and how it learns more while running."""

from functools import partial

from prometheus_client import CollectorRegistry

from llmpilot_contracts.subjects import MEASUREMENT_RECORDED, STREAMS
from llmpilot_perfmodel.gpu_catalogue import load_catalogue
from llmpilot_perfmodel.prices import load_prices
from llmpilot_recommender.dataset import Dataset
from llmpilot_recommender.dataset_file import read_dataset
from llmpilot_recommender.knowledge import Knowledge
from llmpilot_recommender.measured_llms import load_measured_llms
from llmpilot_recommender.predictor_xgboost import load_predictor
from llmpilot_recommender.servicer import RecommendationServicer
from llmpilot_recommender.settings import RecommenderSettings
from llmpilot_servicekit.logs import get_logger
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_servicekit.server import serve


def load_knowledge(settings: RecommenderSettings) -> Knowledge:
    """Read dataset, model, catalogue and prices; raises InvalidInputError that names the file at fault."""
    manifest, predictor = load_predictor(settings.model)
    return Knowledge(
        dataset=Dataset(read_dataset(settings.dataset).measurements),
        llms=load_measured_llms(),
        catalogue=load_catalogue(settings.gpus),
        prices=load_prices(settings.prices),
        predictor=predictor,
        manifest=manifest,
    )


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
