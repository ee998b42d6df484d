"""The recommender's settings, from the environment."""

from pathlib import Path

from llmpilot_recommender.dataset_file import BUNDLED_DATASET
from llmpilot_recommender.model_store import BUNDLED_MODEL
from llmpilot_servicekit.settings import ServiceSettings


class RecommenderSettings(ServiceSettings):
    """`LLMPILOT_...` variables beside those every service has."""

    dataset: Path = BUNDLED_DATASET
    """LLMPILOT_DATASET: the dataset file to start from."""
    model: Path = BUNDLED_MODEL
    """LLMPILOT_MODEL: the folder of a trained model."""
    gpus: Path | None = None
    """LLMPILOT_GPUS: a CSV file that adds GPUs to the catalogue or overrides some."""
    prices: Path | None = None
    """LLMPILOT_PRICES: a CSV file that adds prices to the default ones or replaces some."""
