import string
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpilot_contracts.dataset_schema import COLUMN_NAMES
from llmpilot_contracts.errors import InvalidInputError, NotFoundError, PreconditionError
from llmpilot_recommender.dataset_file import BUNDLED_DATASET, read_dataset, violations_of, write_dataset
from llmpilot_recommender.measurement import Measurement, Origin, Quantiles

HEADER = ",".join(COLUMN_NAMES)
ROW = "llama-13b,1xA100-40GB,64,measured,120.0,44.0,75.6,112.2,134.0,0.5,2.2,2.9,7.1,19.0,20,20,20,50.2,100,80,0.8,75"
PLAIN = Measurement(llm="a", gpu_profile="b", users_count=1, origin=Origin.SIMULATED)


def file_of(folder: Path, *lines: str, end: str = "\n") -> Path:
    path = folder / "table.csv"
    path.write_text("\n".join(lines) + end, encoding="utf-8")
    return path


def violations(path: Path) -> list[str]:
    with pytest.raises(InvalidInputError) as caught:
        read_dataset(path)
    return [str(violation) for violation in caught.value.violations]


def test_row_is_read_column_by_column(tmp_path: Path) -> None:
    content = read_dataset(file_of(tmp_path, "# schema: 1", "# source: a: b", HEADER, ROW))
    assert content.provenance == {"source": "a: b"}
    assert content.measurements == (
        Measurement(
            llm="llama-13b",
            gpu_profile="1xA100-40GB",
            users_count=64,
            origin=Origin.MEASURED,
            test_seconds=120,
            ttft=Quantiles(median_ms=44, p90_ms=75.6, p95_ms=112.2, p99_ms=134),
            nttft=Quantiles(median_ms=0.5, p90_ms=2.2, p95_ms=2.9, p99_ms=7.1),
            itl=Quantiles(median_ms=19, p90_ms=20, p95_ms=20, p99_ms=20),
            throughput_tokens_per_second=50.2,
            request_count=100,
            error_count=80,
            oom_count=75,
        ),
    )


def test_windows_line_ends_and_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_bytes("\r\n".join(["\ufeff# schema: 1", "# source: x", HEADER, ROW, ""]).encode())
    assert read_dataset(path).measurements[0].oom_count == 75
    assert read_dataset(path).provenance == {"source": "x"}


def test_written_file_has_the_documented_form(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_dataset(path, [PLAIN], {"source": "here", "licence": "free"})
    assert (
        path.read_bytes()
        == f"# schema: 1\n# source: here\n# licence: free\n# rows: 1\n{HEADER}\na,b,1,simulated{',' * 18}\n".encode()
    )


def test_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="dataset file"):
        read_dataset(tmp_path / "none.csv")


def test_folder_is_rejected(tmp_path: Path) -> None:
    assert violations(tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]


def test_empty_file_is_rejected(tmp_path: Path) -> None:
    assert violations(file_of(tmp_path, end="")) == [
        "table.csv: the first line must be '# schema: 1'",
        "table.csv: the last line is cut off; fetch or write the file again",
    ]


def test_file_without_a_table_is_rejected(tmp_path: Path) -> None:
    assert violations(file_of(tmp_path, "# schema: 1"))[0] == (
        "table.csv column llm: must appear once, appears 0 times"
    )


def test_file_that_is_not_utf_8_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b"# schema: 1\n\xff\xfe")
    assert violations(path) == ["table.csv: must be UTF-8 text, byte 12 is not; is it a compressed file?"]


def test_other_schema_version_is_rejected(tmp_path: Path) -> None:
    (violation,) = violations(file_of(tmp_path, "# schema: 2", HEADER, ROW))
    assert violation.startswith("table.csv: has schema version 2, this program reads version 1; ")


@pytest.mark.parametrize("cut", [1, 2, 30, 150])
def test_file_cut_off_is_rejected(tmp_path: Path, cut: int) -> None:
    text = "\n".join(["# schema: 1", HEADER, ROW, ""])
    path = tmp_path / "table.csv"
    path.write_text(text[:-cut], encoding="utf-8")
    assert "the last line is cut off" in violations(path)[-1]


def test_every_bad_row_and_column_is_named(tmp_path: Path) -> None:
    path = file_of(
        tmp_path,
        "# schema: 1",
        HEADER,
        ROW,
        ROW.replace("64", "lots").replace("19.0", "nan"),
        ROW,
        ROW.replace("64", "32").replace("0.8", "0.1"),
        "llama-13b,1xA100-40GB",
    )
    assert violations(path) == [
        "table.csv row 2, column users_count: must be a whole number, is 'lots'",
        "table.csv row 2, column itl_ms_median: must be a number, is 'nan'",
        "table.csv row 3: repeats row 1 (llama-13b, 1xA100-40GB, 64)",
        "table.csv row 4, column error_rate: must be error_count / request_count = 0.8, is '0.1'",
        "table.csv row 5: has 2 cells, must have 22",
    ]


def test_open_quote_is_rejected(tmp_path: Path) -> None:
    assert violations(file_of(tmp_path, "# schema: 1", HEADER, f'"{ROW}'))[0].startswith("table.csv: must be CSV: ")


def test_comment_without_a_key_or_with_a_repeated_one_is_named(tmp_path: Path) -> None:
    assert violations(file_of(tmp_path, "# schema: 1", "#hello", "# source: a", "# source: b", HEADER, ROW)) == [
        "table.csv line 2: a comment must be '# key: value' on one line, the key in lower case",
        "table.csv line 4: repeats the comment 'source'",
    ]


@pytest.mark.parametrize("provenance", [{"source": "two\nlines"}, {"Source": "x"}, {"source": ""}, {"schema": "1"}])
def test_provenance_that_could_not_be_read_back_is_not_written(tmp_path: Path, provenance: dict[str, str]) -> None:
    with pytest.raises(InvalidInputError, match=r"table\.csv line 2"):
        write_dataset(tmp_path / "table.csv", [PLAIN], provenance)
    assert list(tmp_path.iterdir()) == []


def test_bad_measurements_are_not_written(tmp_path: Path) -> None:
    bad = [replace(PLAIN, test_seconds=float("nan")), replace(PLAIN, users_count=0), replace(PLAIN, llm="")]
    with pytest.raises(InvalidInputError) as caught:
        write_dataset(tmp_path / "table.csv", bad, {})
    assert [violation.field for violation in caught.value.violations] == [
        "table.csv row 1, column test_seconds",
        "table.csv row 2, column users_count",
        "table.csv row 3, column llm",
    ]
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_dataset(path, [PLAIN], {})
    with pytest.raises(InvalidInputError):
        write_dataset(path, [], {})
    assert read_dataset(path).measurements == (PLAIN,)


def test_write_into_a_missing_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="cannot be written: No such file or directory"):
        write_dataset(tmp_path / "none" / "table.csv", [PLAIN], {})


def test_violations_of_a_measurement_name_its_columns() -> None:
    bad = replace(PLAIN, users_count=0, itl=Quantiles(median_ms=-1))
    assert [violation.field for violation in violations_of(bad)] == [
        "measurement.users_count",
        "measurement.itl_ms_median",
    ]
    assert list(violations_of(PLAIN)) == []


def test_bundled_dataset_is_complete() -> None:
    content = read_dataset(BUNDLED_DATASET)
    assert len(content.measurements) == 528
    assert content.provenance["licence"] == "CDLA-Permissive-2.0"
    assert BUNDLED_DATASET.with_name("LICENSE-DATA.md").is_file()


NAMES = st.text(st.characters(codec="utf-8"), min_size=1).filter(
    lambda name: name.isprintable() and name == name.strip()
)
NUMBERS = st.none() | st.floats(min_value=0, allow_nan=False, allow_infinity=False)
QUANTILES = st.builds(Quantiles, median_ms=NUMBERS, p90_ms=NUMBERS, p95_ms=NUMBERS, p99_ms=NUMBERS)


@st.composite
def measurements(draw: st.DrawFn) -> Measurement:
    request_count = draw(st.none() | st.integers(0, 10**15))
    error_count = draw(st.none() | st.integers(0, 10**15 if request_count is None else request_count))
    return Measurement(
        llm=draw(NAMES),
        gpu_profile=draw(NAMES),
        users_count=draw(st.integers(1, 10**6)),
        origin=draw(st.sampled_from(Origin)),
        test_seconds=draw(NUMBERS),
        ttft=draw(QUANTILES),
        nttft=draw(QUANTILES),
        itl=draw(QUANTILES),
        throughput_tokens_per_second=draw(NUMBERS),
        request_count=request_count,
        error_count=error_count,
        oom_count=draw(st.none() | st.integers(0, 10**15 if error_count is None else error_count)),
    )


PROVENANCE = st.dictionaries(
    st.text(string.ascii_lowercase, min_size=1).filter(lambda key: key != "schema"),
    st.text(st.characters(codec="utf-8"), min_size=1).filter(
        lambda value: value.isprintable() and value == value.strip()
    ),
)


@settings(deadline=None)  # each example syncs a file to disk
@given(rows=st.lists(measurements(), min_size=1, max_size=5, unique_by=lambda row: row.key), provenance=PROVENANCE)
def test_what_was_written_is_read_back_exactly(
    rows: Iterable[Measurement], provenance: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("round_trip") / "table.csv"
    write_dataset(path, rows, provenance)
    content = read_dataset(path)
    assert content.measurements == tuple(rows)
    assert content.provenance == provenance
    assert list(path.parent.iterdir()) == [path]


def test_a_file_cut_at_the_end_of_a_line_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cut.csv"
    file.write_text("".join(BUNDLED_DATASET.read_text().splitlines(keepends=True)[:-10]))
    with pytest.raises(InvalidInputError, match="has 518 rows, its '# rows' says 528"):
        read_dataset(file)
