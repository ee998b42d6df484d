import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError, NotFoundError
from llmpilot_workload_generator.files.edges_file import read_edges, write_edges
from llmpilot_workload_generator.files.model_file import read_model
from llmpilot_workload_generator.model import Bins, Kind
from llmpilot_workload_generator.profiles import profile_path

EDGES: dict[str, Any] = {
    "format": "llm-pilot workload edges",
    "version": 1,
    "parameters": [
        {"name": "input_tokens", "kind": "integer", "edges": [1.0, 20.5]},
        {"name": "llm", "kind": "category", "edges": [0.0, 1.0], "categories": ["a", "b", "c"]},
    ],
}


def edges_file(folder: Path, **changes: Any) -> Path:
    path = folder / "e.json"
    path.write_text(json.dumps({**EDGES, **changes}), encoding="utf-8")
    return path


def problem(path: Path) -> str:
    with pytest.raises(InvalidInputError) as caught:
        read_edges(path)
    return str(caught.value)


def test_edges_are_read(tmp_path: Path) -> None:
    tokens, llm = read_edges(edges_file(tmp_path))
    assert tokens.same_as(Bins(name="input_tokens", kind=Kind.INTEGER, edges=np.array([1.0, 20.5])))
    assert llm.categories == ("a", "b", "c")
    assert llm.kind is Kind.CATEGORY


@given(st.sets(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=256))
def test_edges_come_back_exactly(tmp_path_factory: pytest.TempPathFactory, edges: set[float]) -> None:
    path = tmp_path_factory.mktemp("edges") / "e.json"
    written = Bins(name="x", kind=Kind.NUMBER, edges=np.array(sorted(edges)))
    write_edges(path, (written,))
    (read,) = read_edges(path)
    assert read.same_as(written)


def test_model_file_gives_its_edges() -> None:
    path = profile_path("production")
    found = read_edges(path)
    assert all(one.same_as(parameter.bins) for one, parameter in zip(found, read_model(path).parameters, strict=True))


def test_file_of_another_version_is_rejected(tmp_path: Path) -> None:
    assert problem(edges_file(tmp_path, version=2)) == (
        "e.json: has version 2 of the format, this program reads version 1; find the edges again"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format": "edges"}, 'must be an edges file, whose "format" is "llm-pilot workload edges"'),
        ({"parameters": []}, "e.json: parameters: "),
        ({"parameters": [EDGES["parameters"][0]] * 2}, "parameters must have distinct names"),
        ({"parameters": [{"name": "x", "kind": "number", "edges": []}]}, "parameters.0.edges: "),
        ({"parameters": [{"name": "x", "kind": "number", "edges": [1.0, 1.0]}]}, "must rise strictly"),
        ({"parameters": [{"name": "x", "kind": "number", "edges": list(range(257))}]}, "at most 256 items"),
        ({"parameters": [{"name": "x", "kind": "number", "edges": ["1"]}]}, "should be a valid number"),
        ({"parameters": [{"name": "a\nb", "kind": "number", "edges": [1.0]}]}, "must be one line of text"),
        ({"parameters": [{"name": "x", "kind": "category", "edges": [0.0]}]}, "categories go with the kind"),
        ({"more": 1}, "e.json: more: Extra inputs are not permitted"),
    ],
)
def test_bad_edges_are_rejected(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    assert expected in problem(edges_file(tmp_path, **changes))


@pytest.mark.parametrize("content", [b"", b"{", b"1,2\n", b"\xff\xfe", b"[" * 100_000])
def test_file_that_is_no_json_is_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "e.json"
    path.write_bytes(content)
    assert "e.json: must be an edges file" in problem(path)


def test_damaged_model_file_is_rejected_as_such(tmp_path: Path) -> None:
    path = tmp_path / "m.workload"
    path.write_bytes(profile_path("production").read_bytes()[:-1])
    assert problem(path) == "m.workload: is cut off or damaged; fetch or write it again"


def test_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="edges file"):
        read_edges(tmp_path / "none.json")
