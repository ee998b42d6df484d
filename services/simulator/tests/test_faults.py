import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_simulator.faults import Faults, Gate, ServerFaults, held_back, parse_faults


def test_no_header_leaves_the_faults_of_the_settings() -> None:
    default = Faults(stream_interval=3)

    assert parse_faults(None, default) is default
    assert parse_faults("", default) is default


def test_a_header_overrides_what_it_names_and_nothing_else() -> None:
    faults = parse_faults("drop-after=3, role-chunk=early", Faults(stream_interval=3))

    assert faults == Faults(stream_interval=3, drop_after=3, role_chunk="early")


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ("explode=1", "'explode' is none of drop-after, empty-every, out-of-memory-after, reject, reset-after"),
        ("drop-after=soon", "drop-after must be a whole number >= 0, is 'soon'"),
        ("drop-after", "drop-after must be a whole number >= 0, is ''"),
        ("reject=500", "reject must be 429 or 503, is 500"),
        ("stream-interval=0", "stream-interval must be >= 1, is 0"),
        ("empty-every=1", "empty-every must be >= 2, is 1"),
        ("role-chunk=late", "role-chunk must be one of with-first-token, early, off, is late"),
        ("drop-after=99999999999999999999", "drop-after must be a whole number"),
    ],
)
def test_a_bad_header_says_what_is_wrong(header: str, complaint: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_faults(header, Faults())

    assert complaint in str(caught.value)
    assert caught.value.violations[0].field == "x-simulate-fault"


def test_everything_wrong_with_a_header_is_said_at_once() -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_faults("explode=1, drop-after=x, stream-interval=0, empty-every=0", Faults())

    assert len(caught.value.violations) == 4


def test_everything_wrong_with_the_servers_faults_is_said_at_once() -> None:
    with pytest.raises(InvalidInputError) as caught:
        ServerFaults(reject_share=1.5, reject_above_waiting=-1, reject_status=404, slow_start_seconds=float("nan"))

    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["reject_share", "reject_above_waiting", "reject_status", "slow_start_seconds"]


def test_a_share_of_requests_is_rejected_and_the_same_ones_every_time() -> None:
    """Binomial(10,000, 0.2) has a standard deviation of 40: 200 is five of them."""

    def rejections() -> list[int | None]:
        gate = Gate(ServerFaults(reject_share=0.2, reject_status=503, seed=7), start_seconds=0)
        return [gate.rejection(Faults(), now_seconds=1, waiting_count=0) for _ in range(10_000)]

    first = rejections()

    assert set(first) == {None, 503}
    assert abs(first.count(503) - 2_000) < 200
    assert first == rejections()


def test_requests_are_rejected_while_too_many_wait() -> None:
    gate = Gate(ServerFaults(reject_above_waiting=2), start_seconds=0)

    assert gate.rejection(Faults(), now_seconds=1, waiting_count=2) is None
    assert gate.rejection(Faults(), now_seconds=1, waiting_count=3) == 429


def test_a_slow_start_answers_503_until_it_is_over() -> None:
    gate = Gate(ServerFaults(slow_start_seconds=5), start_seconds=100)

    assert not gate.is_ready(104.9)
    assert gate.rejection(Faults(), now_seconds=104.9, waiting_count=0) == 503
    assert gate.is_ready(105)
    assert gate.rejection(Faults(), now_seconds=105, waiting_count=0) is None


def test_a_closed_gate_lets_nothing_in() -> None:
    gate = Gate(ServerFaults(), start_seconds=0)
    gate.close()

    assert gate.rejection(Faults(), now_seconds=1, waiting_count=0) == 503


def test_every_third_token_has_no_text_and_the_next_one_has_both() -> None:
    assert held_back(("a", "b", "c", "d", "e", "f"), 3) == ("a", "b", "", "cd", "e", "f")  # the last one keeps its own


@given(st.lists(st.text(max_size=3)), st.one_of(st.none(), st.integers(2, 9)))
def test_holding_text_back_changes_neither_the_text_nor_the_number_of_tokens(pieces: list[str], every: int) -> None:
    held = held_back(pieces, every)

    assert "".join(held) == "".join(pieces)
    assert len(held) == len(pieces)
