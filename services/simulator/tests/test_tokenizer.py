import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_simulator.tokenizer import Tokenizer, prefix_hashes

ENGLISH = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this "
    "truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful property "
    "of some one or other of their daughters."
)

ANY_TEXT = st.text(st.characters(codec=None))
"""Lone surrogates included."""
WRITTEN = st.lists(
    st.sampled_from(["the", " Word", "internationally", "  ", " ", "\n", "007", "12345", ",", " (", "é", "汉字", "🙂"])
).map("".join)


@given(ANY_TEXT | WRITTEN)
def test_decoding_gives_the_text_back(text: str) -> None:
    tokenizer = Tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(ANY_TEXT | WRITTEN)
def test_pieces_ids_and_count_agree(text: str) -> None:
    tokenizer = Tokenizer()
    pieces = tokenizer.pieces(text)
    assert "".join(pieces) == text
    assert tokenizer.count(text) == len(pieces) == len(tokenizer.encode(text))


@given(st.lists(ANY_TEXT | WRITTEN, max_size=5))
def test_different_pieces_have_different_ids(texts: list[str]) -> None:
    tokenizer = Tokenizer()
    pieces = {piece for text in texts for piece in tokenizer.pieces(text)}
    assert len({tokenizer.encode(piece)[0] for piece in pieces}) == len(pieces)


def test_text_is_cut_into_the_pieces_that_the_rules_name() -> None:
    text = "An internationally (known) 12345th   naïve\ncase."
    assert Tokenizer().pieces(text) == [
        *("An", " intern", "ationa", "lly", " (", "known", ")", " ", "123", "45", "th", "   ", "na", "ï", "ve"),
        *("\n", "case", "."),
    ]


def test_english_has_about_four_characters_a_token() -> None:
    assert len(ENGLISH) / Tokenizer().count(ENGLISH) == pytest.approx(4.2, abs=0.3)


def test_ids_are_the_same_in_every_process() -> None:
    script = (
        "import sys; from llmpilot_simulator.tokenizer import Tokenizer, prefix_hashes; "
        "ids = Tokenizer().encode(sys.argv[1]); print(ids, prefix_hashes(ids).tolist())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script, ENGLISH],
            check=True,
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    ids = Tokenizer().encode(ENGLISH)
    assert outputs == {f"{ids} {prefix_hashes(ids).tolist()}\n"}


@given(st.integers(-(2**63), 2**63 - 1))
def test_every_number_decodes(token_id: int) -> None:
    """A client may send any ids as its prompt and ask for its echo."""
    assert isinstance(Tokenizer().decode([token_id]), str)


def test_an_id_of_no_text_is_the_replacement_character() -> None:
    assert Tokenizer().decode([-1, 2**62]) == "\ufffd\ufffd"


def test_ids_fit_into_json_numbers() -> None:
    assert max(Tokenizer().encode(" zzzzzz 🙂 999")) < 2**53


PROMPT_IDS = st.lists(st.integers(0, 5), min_size=1, max_size=40)


@given(PROMPT_IDS, PROMPT_IDS)
def test_hashes_are_equal_exactly_as_far_as_the_prefixes_are(left: list[int], right: list[int]) -> None:
    common = next(
        (at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )
    shortest = min(len(left), len(right))
    are_equal = prefix_hashes(left)[:shortest] == prefix_hashes(right)[:shortest]
    assert are_equal.tolist() == [at < common for at in range(shortest)]


def test_order_changes_the_hash() -> None:
    assert prefix_hashes([1, 2])[-1] != prefix_hashes([2, 1])[-1]


def test_hashes_spread_over_all_bits() -> None:
    """Each of the 64 bits of 4,096 hashes is set with probability 1/2, deviation 32: five of them are 160."""
    bits = np.unpackbits(prefix_hashes([7] * 4096).view(np.uint8).reshape(-1, 8), axis=1).sum(axis=0)
    assert np.all(np.abs(bits.astype(int) - 2048) < 160)


def test_no_tokens_have_no_hashes() -> None:
    assert prefix_hashes([]).tolist() == []


def test_a_megabyte_is_counted_in_a_second() -> None:
    """The aim is a fifth of that; a busy machine may take longer."""
    text = ENGLISH * (1_000_000 // len(ENGLISH))
    start_seconds = time.process_time()
    Tokenizer().count(text)
    assert time.process_time() - start_seconds < 1


@given(ANY_TEXT | WRITTEN, st.integers(1, 5))
def test_a_text_encoded_in_parts_has_the_same_ids(text: str, part_tokens: int) -> None:
    tokenizer = Tokenizer()
    parts = list(tokenizer.encode_parts(text, part_tokens))
    assert [token_id for part in parts for token_id in part] == tokenizer.encode(text)
    assert all(len(part) == part_tokens for part in parts[:-1])
