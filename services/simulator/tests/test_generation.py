import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_simulator.generation import Generation, GenerationRequest, Generator, ReplyLengths
from llmpilot_simulator.tokenizer import Tokenizer

TOKENIZER = Tokenizer()
NEVER = ReplyLengths(never_ends=True)


def planned(generator: Generator | None = None, **fields: object) -> Generation:
    given_fields: dict[str, object] = {"prompt": "Tell me.", "max_tokens": 50, "seed": 1} | fields
    request = GenerationRequest(**given_fields)  # type: ignore[arg-type]
    return (generator or Generator(TOKENIZER, reply_lengths=NEVER)).plan(request)


def replayed(
    tokens: tuple[str, ...], stop: tuple[str, ...], *, min_tokens: int, includes: bool
) -> tuple[str, str, int]:
    """Go token by token, as a server does: the text, the stop string ("": none), and how many tokens it took."""
    text = ""
    for count, token in enumerate(tokens, 1):
        before, text = len(text), text + token
        if count <= min_tokens:
            continue
        for each in stop:
            place = text.find(each, max(0, before - len(each) + 1))
            if place >= 0:
                return text[: place + len(each) * includes], each, count
    return text, "", len(tokens)


def test_the_reply_has_as_many_tokens_as_asked_for() -> None:
    reply = planned(max_tokens=30)

    assert reply.finish_reason == "length"
    assert reply.stop_sequence is None
    assert len(reply.pieces) == 30
    assert reply.tokens == reply.pieces


@given(st.integers(0, 2**63 - 1), st.integers(1, 300))
def test_the_text_of_a_reply_has_exactly_the_tokens_it_was_generated_with(seed: int, max_tokens: int) -> None:
    reply = planned(Generator(TOKENIZER), seed=seed, max_tokens=max_tokens)

    texts = reply.pieces[:-1] if reply.finish_reason == "eos" else reply.pieces
    assert TOKENIZER.pieces("".join(texts)) == list(texts)
    assert all(texts)
    assert reply.finish_reason == "length" or not reply.pieces[-1]


def test_a_reply_can_be_longer_than_the_text_it_is_taken_from() -> None:
    reply = planned(max_tokens=100_000)

    assert TOKENIZER.count("".join(reply.pieces)) == len(reply.pieces) == 100_000


def test_the_token_that_ends_the_text_counts_and_has_no_text() -> None:
    reply = planned(Generator(TOKENIZER, reply_lengths=ReplyLengths(median_tokens=7, log_deviation=0)))

    assert reply.finish_reason == "eos"
    assert len(reply.pieces) == 7
    assert reply.pieces[-1] == reply.tokens[-1] == ""


@pytest.mark.parametrize(
    ("min_tokens", "count", "reason"), [(0, 7, "eos"), (6, 7, "eos"), (9, 10, "eos"), (20, 20, "length")]
)
def test_the_text_does_not_end_before_its_least_length(min_tokens: int, count: int, reason: str) -> None:
    generator = Generator(TOKENIZER, reply_lengths=ReplyLengths(median_tokens=7, log_deviation=0))

    reply = planned(generator, min_tokens=min_tokens, max_tokens=20)

    assert (len(reply.pieces), reply.finish_reason) == (count, reason)


def test_only_the_limit_ends_a_text_whose_end_is_ignored() -> None:
    generator = Generator(TOKENIZER, reply_lengths=ReplyLengths(median_tokens=7, log_deviation=0))

    assert planned(generator, ignore_eos=True, max_tokens=20).finish_reason == "length"


def test_lengths_have_the_distribution_that_they_should() -> None:
    """Of 4,000 draws: the mean of the logarithm within 5 standard errors, 0.98 / sqrt(4000) each; its deviation too."""
    generator = Generator(TOKENIZER, seed=3)

    logs = [math.log(len(planned(generator, seed=None, max_tokens=10**6).pieces)) for _ in range(4_000)]

    assert statistics.fmean(logs) == pytest.approx(math.log(145), abs=5 * 0.98 / math.sqrt(4_000))
    assert statistics.stdev(logs) == pytest.approx(0.98, abs=5 * 0.98 / math.sqrt(8_000))


def test_the_default_lengths_have_the_mean_that_was_published() -> None:
    """ShareGPT, 235 tokens: e^(0.98^2 / 2) = 1.616."""
    lengths = ReplyLengths()
    assert lengths.median_tokens * math.exp(lengths.log_deviation**2 / 2) == pytest.approx(235, rel=0.01)


def test_the_same_seed_and_prompt_give_the_same_reply_on_any_server() -> None:
    first = planned(Generator(TOKENIZER, seed=1), seed=42)
    second = planned(Generator(TOKENIZER, seed=2), seed=42)

    assert first.pieces == second.pieces


def test_another_prompt_or_seed_gives_another_reply() -> None:
    generator = Generator(TOKENIZER)
    texts = {
        planned(generator, prompt=prompt, seed=seed, max_tokens=200).pieces
        for prompt in ("One.", "Two.")
        for seed in (1, 2)
    }

    assert len(texts) == 4


def test_without_a_seed_every_reply_is_another_and_the_order_decides() -> None:
    def texts() -> list[tuple[str, ...]]:
        generator = Generator(TOKENIZER, seed=5)
        return [planned(generator, seed=None).pieces for _ in range(5)]

    assert texts() == texts()
    assert len(set(texts())) == 5


def test_a_prompt_of_ids_is_counted_as_it_is() -> None:
    assert planned(prompt=[1, 2, 3]).input_tokens == 3
    assert planned(prompt="one two three").input_tokens == 3
    assert planned(prompt="").input_tokens == 1


def test_equal_blocks_of_a_prompt_have_equal_hashes_only_behind_equal_ones() -> None:
    generator = Generator(TOKENIZER, reply_lengths=NEVER, block_size=4)

    def hashes(ids: list[int]) -> list[int]:
        return [int(value) for value in planned(generator, prompt=ids).block_hashes]

    whole = hashes([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert len(whole) == 2  # the ninth token fills no block
    assert hashes([1, 2, 3, 4, 5, 6, 7, 8]) == whole
    assert hashes([1, 2, 3, 4, 5, 6, 7, 0])[0] == whole[0]
    assert hashes([1, 2, 3, 4, 5, 6, 7, 0])[1] != whole[1]
    assert hashes([0, 2, 3, 4, 5, 6, 7, 8])[1] != whole[1]
    assert planned(generator, prompt=[1, 2, 3]).block_hashes.dtype == np.int64


STOPS = st.lists(
    st.sampled_from([".", ",", " the", "e", "ed", " a", ". T", "s. ", "zebra", "th", " of the", "ou", "t"]),
    min_size=1,
    max_size=4,
).map(tuple)


@given(st.integers(0, 10_000), STOPS, st.integers(0, 30), st.booleans())
def test_a_stop_string_cuts_where_a_server_that_looks_after_every_token_does(
    seed: int, stop: tuple[str, ...], min_tokens: int, includes: bool
) -> None:
    unstopped = planned(seed=seed, max_tokens=40)
    text, found, count = replayed(unstopped.pieces, stop, min_tokens=min_tokens, includes=includes)

    reply = planned(seed=seed, max_tokens=40, stop=stop, min_tokens=min_tokens, include_stop=includes)

    assert "".join(reply.pieces) == text
    assert reply.stop_sequence == (found or None)
    assert reply.finish_reason == ("stop" if found else "length")
    assert len(reply.pieces) == len(reply.tokens) == count
    assert reply.tokens == unstopped.tokens[:count]


@given(st.integers(0, 10_000), STOPS)
def test_text_that_has_arrived_is_never_taken_back(seed: int, stop: tuple[str, ...]) -> None:
    """And no more is held back than the longest stop string could still take, less a character."""
    reply = planned(seed=seed, max_tokens=40, stop=stop)
    whole = "".join(reply.pieces)
    held = max(map(len, stop)) - 1

    for count in range(1, len(reply.pieces)):
        arrived, generated = "".join(reply.pieces[:count]), "".join(reply.tokens[:count])
        assert whole.startswith(arrived)
        assert len(arrived) == max(0, len(generated) - held)


def test_a_stop_string_that_stays_holds_nothing_back() -> None:
    reply = planned(stop=("zebra",), include_stop=True)

    assert reply.pieces == reply.tokens


def test_a_stop_string_before_the_least_length_is_not_seen() -> None:
    """It counts only when its last character comes later."""
    unstopped = planned()
    first = unstopped.pieces[0]

    assert planned(stop=(first,), min_tokens=1).stop_sequence != first or unstopped.pieces.count(first) > 1
    assert planned(stop=(first,)).pieces == ("",)


def test_everything_wrong_with_a_request_is_said_at_once() -> None:
    with pytest.raises(InvalidInputError) as caught:
        GenerationRequest(prompt="", max_tokens=0, min_tokens=-1, stop=("",))

    assert [violation.field for violation in caught.value.violations] == ["max_tokens", "min_tokens", "stop"]


def test_a_least_length_above_the_limit_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="min_tokens: must be <= max_tokens 5, is 6"):
        GenerationRequest(prompt="", max_tokens=5, min_tokens=6)


@pytest.mark.parametrize("field", ["median_tokens", "log_deviation"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_impossible_lengths_are_refused(field: str, value: float) -> None:
    with pytest.raises(InvalidInputError, match=field):
        ReplyLengths(**{field: value})  # type: ignore[arg-type]


def test_a_line_break_ends_a_long_enough_reply() -> None:
    """Prompts for one line of code stop at a line break; a text without any would never end."""
    for seed in range(20):
        reply = planned(max_tokens=200, stop=("\n",), ignore_eos=True, seed=seed)
        assert reply.finish_reason == "stop"
        assert "\n" not in "".join(reply.pieces)
