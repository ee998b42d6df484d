import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_recommender.aggregation import aggregate
from llmpilot_recommender.published import gpu_profile_name
from llmpilot_recommender.raw_records import parse_raw_file

HEADER = (
    ",smpnum,errors,status,model,num_users,n_gpus,gpu_type,experiment_duration_s,n_input_tokens,n_output_tokens,"
    "latency_ms_per_token"
)
OK = '0,879,[],200,google/flan-t5-xl,4,2,A100,120,39,2,"[8, 164, 19]"'
OUT_OF_MEMORY = """1,5,"['torch.cuda.OutOfMemoryError: no']",408,google/flan-t5-xl,4,2,A100,120,,,[20]"""
FAILED = """2,6,['timeout'],408,google/flan-t5-xl,4,2,A100,120,,,[]"""
NAME = "results_google__flan-t5-xl_gpu2_a100_u4.csv"


def content_of(*lines: str) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def violations(*lines: str, name: str = NAME) -> list[str]:
    with pytest.raises(InvalidInputError) as caught:
        parse_raw_file(name, content_of(*lines))
    return [str(violation) for violation in caught.value.violations]


def test_file_is_read_column_by_column() -> None:
    raw = parse_raw_file(NAME, content_of(HEADER, OK, OUT_OF_MEMORY, FAILED))
    assert (raw.llm, raw.gpu_profile, raw.users_count) == ("google/flan-t5-xl", "2xA100-40GB", 4)
    assert raw.test_seconds == 120
    assert raw.status.tolist() == [200, 408, 408]
    np.testing.assert_array_equal(raw.input_tokens, [39, np.nan, np.nan])
    np.testing.assert_array_equal(raw.output_tokens, [2, np.nan, np.nan])
    assert raw.is_out_of_memory.tolist() == [False, True, False]
    assert raw.latency_text.tobytes() == b"[8, 164, 19][20][]"
    assert raw.latency_offsets.tolist() == [0, 12, 16, 18]


def test_header_with_one_more_unnamed_column_is_read() -> None:
    raw = parse_raw_file(NAME, content_of(",Unnamed: 0" + HEADER, f"7,{OK}"))
    assert raw.latency_text.tobytes() == b"[8, 164, 19]"


def test_token_counts_written_as_floats_are_read() -> None:
    raw = parse_raw_file(NAME, content_of(HEADER, OK.replace("39,2,", "39.0,2.0,")))
    assert (raw.input_tokens.tolist(), raw.output_tokens.tolist()) == ([39], [2])


@pytest.mark.parametrize(
    ("gpu_type", "profile"),
    [
        ("A10", "3xA10-24GB"),
        ("A100", "3xA100-40GB"),
        ("H100", "3xH100-80GB"),
        ("T4", "3xT4-16GB"),
        ("V100", "3xV100-16GB"),
    ],
)
def test_gpu_types_have_catalogue_names(gpu_type: str, profile: str) -> None:
    assert gpu_profile_name("3", gpu_type) == profile


def test_any_file_name_is_read_when_it_says_nothing() -> None:
    assert parse_raw_file("monday.csv", content_of(HEADER, OK)).users_count == 4


def test_file_name_that_contradicts_the_columns_is_rejected() -> None:
    assert violations(HEADER, OK, name="some/results_llama-7b_gpu1_h100_u8.csv") == [
        "some/results_llama-7b_gpu1_h100_u8.csv column model: "
        "must be 'llama-7b' as the file name says, is 'google/flan-t5-xl'",
        "some/results_llama-7b_gpu1_h100_u8.csv column n_gpus: must be '1' as the file name says, is '2'",
        "some/results_llama-7b_gpu1_h100_u8.csv column gpu_type: must be 'H100' as the file name says, is 'A100'",
        "some/results_llama-7b_gpu1_h100_u8.csv column num_users: must be '8' as the file name says, is '4'",
    ]


def test_mixed_llms_and_users_are_rejected() -> None:
    other = OK.replace("google/flan-t5-xl,4", "llama-7b,8")
    assert violations(HEADER, OK, other, name="a.csv") == [
        "a.csv column model: must be the same in every row, is google/flan-t5-xl, llama-7b",
        "a.csv column num_users: must be the same in every row, is 4, 8",
    ]


def test_every_missing_and_repeated_column_is_named() -> None:
    header = HEADER.replace("smpnum", "status").replace("n_gpus", "gpus")
    assert violations(header, OK) == [
        f"{NAME} column n_gpus: must appear once, appears 0 times",
        f"{NAME} column status: must appear once, appears 2 times",
    ]


def test_every_bad_number_is_named_with_its_row() -> None:
    bad = OK.replace("200", "ok").replace("39,2", "39,two")
    assert violations(HEADER, OK, bad, OK, bad) == [
        f"{NAME} row 2, column status: must be a number, is 'ok'",
        f"{NAME} row 4, column status: must be a number, is 'ok'",
        f"{NAME} row 2, column n_output_tokens: must be a number, is 'two'",
        f"{NAME} row 4, column n_output_tokens: must be a number, is 'two'",
    ]


def test_unknown_gpu_type_is_rejected() -> None:
    (violation,) = violations(HEADER, OK.replace("A100", "B200"), name="a.csv")
    assert violation == "a.csv column gpu_type: must be one of A10, A100, H100, T4, V100, is 'B200'"


@pytest.mark.parametrize(
    ("column", "row"), [("num_users", OK.replace(",4,2", ",0,2")), ("n_gpus", OK.replace(",4,2", ",4,"))]
)
def test_counts_must_be_positive(column: str, row: str) -> None:
    (violation,) = violations(HEADER, row, name="a.csv")
    assert violation.startswith(f"a.csv column {column}: must be a whole number > 0, is ")


def test_empty_cells_are_named() -> None:
    empty = OK.replace('"[8, 164, 19]"', "").replace("google/flan-t5-xl", "")
    assert violations(HEADER, empty, empty, name="a.csv") == [
        "a.csv column model: must not be empty",
        "a.csv row 1, column latency_ms_per_token: must not be empty",
        "a.csv row 2, column latency_ms_per_token: must not be empty",
    ]


def test_every_ragged_row_is_named() -> None:
    assert violations(HEADER, OK, "1,2,3", OK, f"{OK},9") == [
        f"{NAME} row 2: has 3 cells, must have 12",
        f"{NAME} row 4: has 13 cells, must have 12",
    ]


def test_file_without_rows_is_rejected() -> None:
    assert violations(HEADER) == [f"{NAME}: has no rows"]


def test_empty_file_is_rejected() -> None:
    (cut_off, *missing) = violations()
    assert cut_off == f"{NAME}: the last line is cut off; fetch the raw data again"
    assert len(missing) == 10


@pytest.mark.parametrize("cut", [1, 5, 30, 60])
def test_file_cut_off_is_rejected(cut: int) -> None:
    with pytest.raises(InvalidInputError, match="the last line is cut off"):
        parse_raw_file(NAME, content_of(HEADER, OK, OK)[:-cut])


def test_quote_left_open_is_rejected() -> None:
    assert violations(HEADER, OK, OK.removesuffix('"'), OK) == [f"{NAME} row 2: has 14 cells, must have 12"]


def test_file_that_is_not_utf_8_is_rejected() -> None:
    content = content_of(HEADER, OK, OK).replace(b"google", b"\xff", 1)
    with pytest.raises(InvalidInputError, match=f"must be UTF-8 text, byte {content.index(0xFF)} is not"):
        parse_raw_file(NAME, content)


@given(st.lists(st.tuples(st.floats(0, 0.999), st.sampled_from(b'[],"\n 0x\xff\0a')), min_size=1, max_size=4))
def test_any_damage_is_an_error_that_names_the_file_or_harmless(damage: list[tuple[float, int]]) -> None:
    content = bytearray(content_of(HEADER, OK, OUT_OF_MEMORY, FAILED))
    for place, byte in damage:
        content[int(place * len(content))] = byte
    named = []
    try:
        aggregate(parse_raw_file("a.csv", bytes(content)))
    except InvalidInputError as error:
        named = [violation.field.split()[0] for violation in error.violations]
    assert set(named) <= {"a.csv"}
