import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError, NotFoundError
from llmpilot_workload_generator.files.model_file import model_from_bytes, model_to_bytes, read_model, write_model
from llmpilot_workload_generator.model import (
    ArrivalKind,
    Arrivals,
    Bins,
    Kind,
    Parameter,
    Provenance,
    Replay,
    Sketch,
    WorkloadModel,
)

PARAMETERS = st.lists(st.sampled_from(list(Kind)), min_size=1, max_size=4)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
WHOLE = st.integers(-(2**53), 2**53).map(float)


@st.composite
def parameters(draw: st.DrawFn, name: str, kind: Kind, total: int) -> Parameter:
    """Any parameter of at most five bins, one value in each, with `total` values."""
    count = draw(st.integers(1, min(5, total)))
    if kind is Kind.CATEGORY:
        values = np.arange(count, dtype=np.float64)
    else:
        values = np.array(
            sorted(draw(st.sets(FINITE if kind is Kind.NUMBER else WHOLE, min_size=count, max_size=count)))
        )
    cuts = sorted(draw(st.sets(st.integers(1, total - 1), min_size=count - 1, max_size=count - 1)) if count > 1 else ())
    counts = np.diff([0, *cuts, total])
    categories = tuple(f"{place} {draw(st.text(max_size=3))}" for place in range(count))
    exact = draw(st.booleans())
    return Parameter(
        bins=Bins(name=name, kind=kind, edges=values, categories=categories if kind is Kind.CATEGORY else ()),
        sketch=Sketch(values=values, counts=counts, exact=exact, low=float(values[0]), high=float(values[-1])),
        lows=values,
        highs=values,
    )


@st.composite
def replays(draw: st.DrawFn, model: tuple[Parameter, ...]) -> Replay:
    """Any requests of some parameters, of which each has up to three prefix ids."""
    count = draw(st.integers(1, 6))
    columns: dict[str, Any] = {}
    for parameter in model:
        drawn = st.lists(st.integers(0, len(parameter.bins) - 1), min_size=count, max_size=count)
        values = parameter.sketch.values[draw(drawn)]
        if parameter.kind is Kind.CATEGORY:
            columns[parameter.name] = np.array(draw(st.lists(st.text(max_size=4), min_size=count, max_size=count)))
        else:
            columns[parameter.name] = values.astype(np.int64) if parameter.kind is Kind.INTEGER else values
    lengths = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    ids = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=sum(lengths), max_size=sum(lengths)))
    gaps = draw(st.lists(st.integers(0, 2**40), min_size=count, max_size=count))
    return Replay(
        columns=columns,
        arrival_nanos=np.cumsum(np.array(gaps, np.int64)),
        prefix_ids=np.array(ids, np.int64),
        prefix_starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prefix_block_tokens=draw(st.integers(0, 2**40)),
    )


@st.composite
def models(draw: st.DrawFn) -> WorkloadModel:
    """Any small model."""
    counts = np.array(draw(st.lists(st.integers(1, 2**40), min_size=1, max_size=5)), np.int64)
    kinds = draw(PARAMETERS)
    chosen = tuple(draw(parameters(f"p {i}", kind, int(counts.sum()))) for i, kind in enumerate(kinds))
    room = int(np.prod([len(parameter.bins) for parameter in chosen]))
    keys = sorted(draw(st.sets(st.integers(0, room - 1), min_size=1, max_size=len(counts))))
    held = counts[: len(keys)].copy()
    held[-1] += counts[len(keys) :].sum()
    times = st.none() | st.datetimes(timezones=st.just(UTC))
    return WorkloadModel(
        parameters=chosen,
        keys=np.array(keys, np.uint64),
        counts=held,
        provenance=Provenance(
            source=draw(st.text(st.characters(codec="utf-8"), max_size=5)),
            licence="CC-BY-4.0",
            command="fit x",
            row_count=draw(st.integers(0, 2**63)),
            first_time=draw(times),
            last_time=draw(times),
        ),
        arrivals=Arrivals(kind=draw(st.sampled_from(list(ArrivalKind))), rate_per_second=draw(st.floats(0, 1e300))),
        replay=draw(st.none() | replays(chosen)),
    )


def small_model() -> WorkloadModel:
    """Two parameters, three cells, by hand."""
    tokens = Parameter(
        bins=Bins(name="input_tokens", kind=Kind.INTEGER, edges=np.array([1.0, 10.0])),
        sketch=Sketch(values=np.array([1.0, 10.0, 12.0]), counts=np.array([4, 3, 2]), exact=True, low=1.0, high=12.0),
        lows=np.array([1.0, 10.0]),
        highs=np.array([1.0, 12.0]),
    )
    llm = Parameter(
        bins=Bins(name="llm", kind=Kind.CATEGORY, edges=np.array([0.0, 1.0]), categories=("a", "b", "c")),
        sketch=Sketch(values=np.array([0.0, 1.0, 2.0]), counts=np.array([6, 2, 1]), exact=True, low=0.0, high=2.0),
        lows=np.array([0.0, 1.0]),
        highs=np.array([0.0, 2.0]),
    )
    return WorkloadModel(
        parameters=(tokens, llm),
        keys=np.array([0, 2, 3], np.uint64),
        counts=np.array([4, 2, 3]),
        provenance=Provenance(source="by hand", first_time=datetime(2026, 1, 2, tzinfo=UTC)),
        replay=Replay(
            columns={"input_tokens": np.array([10, 1]), "llm": np.array(["b", "a"])},
            arrival_nanos=np.array([0, 5]),
            prefix_ids=np.array([7, 8, 7]),
            prefix_starts=np.array([0, 2, 3]),
            prefix_block_tokens=512,
        ),
    )


def same(first: Any, second: Any) -> bool:
    """Whether two arrays have the same type and the same bits."""
    return bool(first.dtype.kind == second.dtype.kind and first.tobytes() == second.astype(first.dtype).tobytes())


def assert_same_model(first: WorkloadModel, second: WorkloadModel) -> None:
    assert same(first.keys, second.keys)
    assert same(first.counts, second.counts)
    assert (first.provenance, first.arrivals) == (second.provenance, second.arrivals)
    for one, other in zip(first.parameters, second.parameters, strict=True):
        assert one.bins.same_as(other.bins)
        assert same(one.bins.edges, other.bins.edges)
        assert same(one.lows, other.lows)
        assert same(one.highs, other.highs)
        assert same(one.sketch.values, other.sketch.values)
        assert same(one.sketch.counts, other.sketch.counts)
        facts = [(sketch.exact, sketch.low, sketch.high) for sketch in (one.sketch, other.sketch)]
        assert facts[0] == facts[1]
    if first.replay is None or second.replay is None:
        assert first.replay is second.replay
        return
    assert list(first.replay.columns) == list(second.replay.columns)
    assert all(same(column, second.replay.columns[name]) for name, column in first.replay.columns.items())
    for field in ("arrival_nanos", "prefix_ids", "prefix_starts"):
        assert same(getattr(first.replay, field), getattr(second.replay, field))
    assert first.replay.prefix_block_tokens == second.replay.prefix_block_tokens


def problems(content: bytes) -> list[str]:
    with pytest.raises(InvalidInputError) as caught:
        model_from_bytes(content, label="m.workload")
    found = [str(violation) for violation in caught.value.violations]
    assert all(problem.startswith("m.workload: ") for problem in found)
    return [problem.removeprefix("m.workload: ") for problem in found]


def changed(content: bytes, change: Any) -> bytes:
    """Change the header, and make the digest right again, as only somebody who means harm does."""
    _, header, stored = content.split(b"\n", 2)
    parsed = json.loads(header)
    change(parsed)
    body = json.dumps(parsed).encode() + b"\n" + stored
    return b"llm-pilot workload 1 %s\n%s" % (hashlib.sha256(body).hexdigest().encode(), body)


@given(models())
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read_exactly(model: WorkloadModel) -> None:
    content = model_to_bytes(model)
    assert_same_model(model_from_bytes(content, label="m.workload"), model)
    assert model_to_bytes(model) == content


def test_file_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "m.workload"
    write_model(path, small_model())
    assert path.read_bytes().startswith(b"llm-pilot workload 1 ")
    assert_same_model(read_model(path), small_model())


def test_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="workload model"):
        read_model(tmp_path / "none.workload")


def test_folder_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot be read: Is a directory"):
        read_model(tmp_path)


def test_other_file_is_rejected() -> None:
    assert problems(b"TIMESTAMP,ContextTokens\n1,2\n") == ["must be a workload model file; `workload fit` writes one"]


def test_file_of_another_version_is_rejected() -> None:
    content = model_to_bytes(small_model()).replace(b"workload 1 ", b"workload 2 ", 1)
    assert problems(content) == [
        "has version 2 of the format, this program reads version 1; "
        "fit the model again, or use the program that wrote it"
    ]


def test_file_cut_anywhere_is_rejected() -> None:
    content = model_to_bytes(small_model())
    for length in range(len(content)):
        (problem,) = problems(content[:length])
        assert problem.startswith("is cut off or damaged" if length >= len("llm-pilot workload ") else "must be a")


def test_file_with_any_byte_changed_is_rejected() -> None:
    content = model_to_bytes(small_model())
    for place in range(len(content)):
        for flip in (0x01, 0x80):
            damaged = bytearray(content)
            damaged[place] ^= flip
            assert len(problems(bytes(damaged))) == 1


def test_bytes_behind_the_end_are_rejected() -> None:
    assert problems(model_to_bytes(small_model()) + b"x") == ["is cut off or damaged; fetch or write it again"]


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damage_behind_a_right_digest_is_one_error_or_a_sound_model(data: st.DataObject) -> None:
    """Whoever makes the digest right again gets no further than a model that could be written."""
    _, _, body = model_to_bytes(small_model()).partition(b"\n")
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    content = b"llm-pilot workload 1 %s\n%s" % (hashlib.sha256(damaged).hexdigest().encode(), bytes(damaged))
    try:
        model = model_from_bytes(content, label="m.workload")
    except InvalidInputError:
        return
    model_to_bytes(model)


def section(header: dict[str, Any], name: str) -> dict[str, Any]:
    return next(section for section in header["sections"] if section["name"] == name)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda h: section(h, "keys").update(raw_bytes=2**40),
            "'keys' cannot have 1,099,511,627,776 bytes for 3 values",
        ),
        (
            lambda h: section(h, "keys").update(value_count=2**40, raw_bytes=2**40),
            "must have at most 134,217,728 values",
        ),
        (lambda h: section(h, "keys").update(value_count=2), "'keys' cannot be read: must hold 2 numbers, holds 3"),
        (lambda h: section(h, "keys").update(raw_bytes=4), "'keys' cannot be read: "),
        (lambda h: section(h, "keys").update(stored_bytes=1), "must take all of the"),
        (lambda h: section(h, "keys").update(coding="gzip"), "has the unknown coding 'gzip'"),
        (lambda h: section(h, "keys").update(name="counts"), "sections must have distinct names"),
        (lambda h: section(h, "keys").update(name="other"), "must have the section 'keys'"),
        (lambda h: section(h, "replay llm texts").update(name="other"), "must not have the sections 'other'"),
        (lambda h: h.update(replay=None), "must not have the sections 'replay input_tokens', "),
        (lambda h: h.update(more=1), "more: Extra inputs are not permitted"),
        (lambda h: h["parameters"][0]["bins"].update(kind="length"), "parameters.0.bins.kind: "),
        (lambda h: h["parameters"][0]["bins"].update(edges=[10.0, 1.0]), "must rise strictly"),
        (lambda h: h["parameters"][0]["bins"].update(edges=[1.0, float("nan")]), "parameters.0.bins.edges.1: "),
        (lambda h: h["parameters"][0]["bins"].update(name="llm"), "parameters must have distinct names"),
        (lambda h: h["parameters"][0]["bins"].update(edges=[1.0]), "the last key must be below the number of comb"),
        (lambda h: h["parameters"][0].update(lows=[1.0]), "input_tokens: must have a smallest and a largest value"),
        (lambda h: h["parameters"][0].update(highs=[1.0, 9.0]), "the smallest value of a bin must be at most"),
        (lambda h: h["parameters"][0]["sketch"].update(low=0.5), "the smallest and the largest value of the sketch"),
        (lambda h: h["parameters"][1]["bins"].update(categories=["a", "b"]), "must be positions in the categories"),
        (lambda h: h["parameters"][1]["bins"].update(categories=[]), "categories go with the kind category"),
        (lambda h: h["arrivals"].update(burstiness=0), "arrivals.burstiness: "),
        (lambda h: h["provenance"].update(row_count=-1), "provenance.row_count: "),
    ],
)
def test_header_that_lies_is_rejected(change: Any, expected: str) -> None:
    found = problems(changed(model_to_bytes(small_model()), change))
    assert any(expected in problem for problem in found), found


def test_more_combinations_than_keys_have_bits_are_rejected() -> None:
    def change(header: dict[str, Any]) -> None:
        header["parameters"] = [
            {
                **header["parameters"][0],
                "bins": {"name": f"p{i}", "kind": "integer", "edges": list(map(float, range(256)))},
            }
            for i in range(8)
        ]

    assert "the bins of all parameters have more than 2^63 combinations" in problems(
        changed(model_to_bytes(small_model()), change)
    )


@pytest.mark.parametrize(
    ("field", "values", "expected"),
    [
        ("counts", [4, 0, 5], "the counts of the cells must be > 0"),
        ("counts", [4, -2, 7], "the counts of the cells must be > 0"),
        ("counts", [4, 5], "must have a count for each of the 3 cells, has 2"),
        ("counts", [2**53, 2, 3], "the counts of the cells must add up to at most 2^53"),
        ("counts", [4, 2, 4], "the counts of the sketch must be > 0 and add up to those of the cells"),
        ("keys", [0, 3, 2], "the keys of the cells must rise strictly"),
        ("keys", [0, 2, 2], "the keys of the cells must rise strictly"),
        ("keys", [0, 2, 4], "the last key must be below the number of combinations, 4, is 4"),
        ("keys", [0, 2, 2**64 - 1], "the last key must be below the number of combinations"),
    ],
)
def test_cells_that_cannot_be_are_not_written(field: str, values: list[int], expected: str) -> None:
    kinds = {"counts": np.int64, "keys": np.uint64}
    changes: dict[str, Any] = {field: np.array(values, kinds[field])}
    with pytest.raises(InvalidInputError) as caught:
        model_to_bytes(replace(small_model(), **changes))
    assert expected in str(caught.value)


def test_model_without_cells_is_not_written() -> None:
    empty = replace(small_model(), keys=np.zeros(0, np.uint64), counts=np.zeros(0, np.int64))
    with pytest.raises(InvalidInputError, match="must have a cell"):
        model_to_bytes(empty)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"arrival_nanos": np.array([5, 0])}, "the arrivals must never fall"),
        ({"prefix_starts": np.array([0, 3])}, "the starts of the prefix ids must be one for each request and one more"),
        ({"prefix_starts": np.array([0, 4, 3])}, "the starts of the prefix ids must never fall"),
        ({"columns": {"llm": np.array(["a", "b"])}}, "must have a column for each parameter"),
        ({"columns": {"llm": np.array(["a"]), "input_tokens": np.array([1, 1])}}, "llm must have 2 values, has 1"),
    ],
)
def test_replay_that_cannot_be_is_not_written(change: dict[str, Any], expected: str) -> None:
    model = small_model()
    assert model.replay is not None
    with pytest.raises(InvalidInputError) as caught:
        model_to_bytes(replace(model, replay=replace(model.replay, **change)))
    assert expected in str(caught.value)


def test_large_replay_is_compact() -> None:
    """100,000 requests with two lengths and a time take at most 12 bytes each; random ones cannot take less than 8."""
    count = 100_000
    generator = np.random.default_rng(1)
    model = small_model()
    replay = Replay(
        columns={
            "input_tokens": generator.integers(1, 5000, count),
            "llm": np.array(["a", "b"])[generator.integers(0, 2, count)],
        },
        arrival_nanos=np.cumsum(generator.integers(0, 10**9, count)),
        prefix_ids=np.zeros(0, np.int64),
        prefix_starts=np.zeros(0, np.int64),
    )
    content = model_to_bytes(replace(model, replay=replay))
    assert len(content) < 12 * count
    read = model_from_bytes(content, label="m").replay
    assert read is not None
    assert same(read.arrival_nanos, replay.arrival_nanos)
    assert same(read.columns["llm"], replay.columns["llm"])
