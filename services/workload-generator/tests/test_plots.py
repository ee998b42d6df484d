import io
import re
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from llmpilot_workload_generator.model import Bins, Kind, Parameter, Provenance, Sketch, WorkloadModel
from llmpilot_workload_generator.plots import model_figures
from llmpilot_workload_generator.profiles import load_profile


def texts(svg: bytes) -> str:
    """Give the texts of a picture, which matplotlib keeps in comments beside their outlines."""
    ElementTree.fromstring(svg)  # noqa: S314 our own picture
    return " ".join(re.findall("<!-- .*? -->", svg.decode()))


def parameter(name: str, values: list[float], counts: list[int], *, texts: tuple[str, ...] = ()) -> Parameter:
    edges = np.array(values, np.float64)
    sketch = Sketch(values=edges, counts=np.array(counts), exact=True, low=values[0], high=values[-1])
    kind = Kind.CATEGORY if texts else Kind.NUMBER
    return Parameter(
        bins=Bins(name=name, kind=kind, edges=edges, categories=texts), sketch=sketch, lows=edges, highs=edges
    )


def one_parameter_model(chosen: Parameter) -> WorkloadModel:
    keys = np.arange(len(chosen.bins), dtype=np.uint64)
    return WorkloadModel(
        parameters=(chosen,), keys=keys, counts=chosen.sketch.counts, provenance=Provenance(source="by hand")
    )


def test_pictures_are_png_and_svg_with_labels() -> None:
    pictures = model_figures(load_profile("production"), title="production")
    assert set(pictures) == {"cdf.png", "cdf.svg", "correlations.png", "correlations.svg"}
    for name in ("cdf.png", "correlations.png"):
        image = Image.open(io.BytesIO(pictures[name]))
        assert image.format == "PNG"
        assert min(image.size) > 700
    cdf = texts(pictures["cdf.svg"])
    assert "production: marginal distributions of 8,497,715 requests" in cdf
    assert all(f" {label} " in cdf for label in ("input tokens", "empirical", "model: the means of its bins", "1,000"))
    correlations = texts(pictures["correlations.svg"])
    assert all(f" {text} " in correlations for text in ("output tokens", "0.55", "-0.72", "-0.60", "1.00"))


@pytest.mark.parametrize(
    "chosen",
    [
        parameter("x", [5.0], [3]),
        parameter("x", [0.0], [3]),
        parameter("x", [-3.0, 1e6], [3, 1]),
        parameter("x", [0.0, 1e-9, *map(float, range(1, 9)), 1e12], [1] * 11),
        parameter("x", list(map(float, range(100))), [1] * 100),
        parameter("$_{", [0.0, 1.0], [2, 1], texts=("$\\frac{", "_" * 100)),
        parameter("llm", list(map(float, range(40))), [1] * 40, texts=tuple(map(str, range(40)))),
    ],
)
def test_any_parameter_is_drawn(chosen: Parameter) -> None:
    """And one of them alone has no correlations; a warning would be an error."""
    pictures = model_figures(one_parameter_model(chosen), title="$_{x}")
    assert set(pictures) == {"cdf.png", "cdf.svg"}


def test_a_name_with_dollars_is_no_formula() -> None:
    pictures = model_figures(load_profile("code"), title="a$x$b")
    assert "a$x$b: marginal distributions" in texts(pictures["cdf.svg"])
    assert "a$x$b: correlations" in texts(pictures["correlations.svg"])


def test_parameter_of_one_value_is_left_out_of_the_correlations() -> None:
    model = load_profile("code")
    constant = replace(parameter("batch_size", [1.0], [model.request_count]))
    wider = replace(model, parameters=(*model.parameters, constant))
    assert "batch size" not in texts(model_figures(wider, title="x")["correlations.svg"])


def test_matplotlib_is_imported_only_for_a_picture() -> None:
    code = "import sys, llmpilot_workload_generator.plots; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
