import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmpilot_contracts.errors import InvalidInputError, NotFoundError
from llmpilot_workload_generator.prompts import phrase_book
from llmpilot_workload_generator.prompts.corpus import LARGEST_CORPUS_CHARACTERS, default_corpus, read_corpus, words_of


def test_default_corpus_is_ascii_of_at_least_30_000_words_with_no_slot_left_open() -> None:
    corpus = default_corpus()
    assert corpus.isascii()
    assert len(corpus.split()) >= 30_000
    assert not set(corpus) & set("{}")
    assert "  " not in corpus


def test_default_corpus_is_the_same_in_every_process() -> None:
    script = "from llmpilot_workload_generator.prompts.corpus import default_corpus as d; import hashlib; "
    script += "print(hashlib.sha256(d().encode()).hexdigest())"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == hashlib.sha256(default_corpus().encode()).hexdigest()


def test_sentences_do_not_repeat_much() -> None:
    sentences = [sentence for line in default_corpus().splitlines() for sentence in line.split(". ")]
    assert len(set(sentences)) > 0.9 * len(sentences)


def test_no_list_of_a_theme_is_too_short_for_a_pattern_that_names_it_twice() -> None:
    for theme in phrase_book.THEMES:
        for words in (theme.people, theme.things, theme.places, theme.deeds, theme.qualities):
            assert len(set(words)) >= 8


def test_articles_fit_the_words_after_them() -> None:
    corpus = default_corpus()
    assert not re.search(r"\b[Aa] [aeio]|\b[Aa]n [^aeiou]", corpus)
    assert {"a useful", "an urgent"} <= set(re.findall(r"\ban? u\w+", corpus))
    assert {"an useful", "a urgent"}.isdisjoint(re.findall(r"\ban? u\w+", corpus))


def test_words_are_lower_case_letters_each_once() -> None:
    assert words_of("The cat and the Dog, and x1 the 2nd cat. don't well-known end") == ["cat", "and", "the", "end"]


def test_file_is_read_without_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("\ufeffGrüße".encode())
    assert read_corpus(path) == "Grüße"


def test_only_the_first_part_of_a_large_file_is_read_though_the_limit_cuts_a_character(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"a" + "€".encode() * (LARGEST_CORPUS_CHARACTERS * 4 // 3 + 10))
    assert read_corpus(path) == "a" + "€" * (LARGEST_CORPUS_CHARACTERS - 1)


def test_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="text file"):
        read_corpus(tmp_path / "none")


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="corpus: cannot read"):
        read_corpus(tmp_path)


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"abc\xff\xfe" + b"d" * 100)
    with pytest.raises(InvalidInputError, match="must be text in UTF-8, is not at byte 3"):
        read_corpus(path)
