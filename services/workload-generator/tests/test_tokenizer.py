import json
from importlib import resources
from pathlib import Path

import pytest
from tokenizers import Tokenizer as LoadedTokenizer
from tokenizers import models, pre_tokenizers, processors

from llmpilot_contracts.errors import InvalidInputError, NotFoundError, PreconditionError
from llmpilot_workload_generator.prompts.corpus import default_corpus
from llmpilot_workload_generator.prompts.tokenizer import Tokenizer, default_tokenizer, read_tokenizer
from llmpilot_workload_generator.prompts.tokenizer_training import VOCABULARY_SIZE, train_tokenizer

SHIPPED = resources.files("llmpilot_workload_generator") / "data" / "tokenizer.json"


def special_tokenizer() -> LoadedTokenizer:
    """A tokenizer of words that puts two tokens before and one behind, and cuts at four."""
    vocabulary = {"[A]": 0, "[B]": 1, "[C]": 2, "a": 3, "b": 4, "[UNK]": 5}
    tokenizer = LoadedTokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106 not a secret
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[A] [B] $A [C]", special_tokens=[("[A]", 0), ("[B]", 1), ("[C]", 2)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    return tokenizer


def test_shipped_tokenizer_is_what_the_training_makes_of_the_corpus() -> None:
    assert train_tokenizer() + "\n" == SHIPPED.read_text(encoding="utf-8")


def test_default_tokenizer_gives_any_text_back() -> None:
    text = default_corpus()[:2000] + " 汉字 é\n\n\t  42 \U0001f642"
    loaded = LoadedTokenizer.from_str(SHIPPED.read_text(encoding="utf-8"))
    assert loaded.decode(default_tokenizer().encode(text)) == text
    assert loaded.get_vocab_size() == VOCABULARY_SIZE


def test_english_has_between_four_and_five_characters_a_token_as_with_the_tokenizers_of_llms() -> None:
    corpus = default_corpus()
    assert 4 < len(corpus) / default_tokenizer().count(corpus) < 5


def test_tokens_that_the_tokenizer_adds_are_counted_and_nothing_is_cut_or_padded() -> None:
    tokenizer = Tokenizer(special_tokenizer().to_str().encode())
    assert tokenizer.special_count == 3
    assert tokenizer.leading_special_count == 2
    assert tokenizer.count("a b a b a") == 8
    assert tokenizer.count_each(["a", ""]) == [4, 3]
    assert tokenizer.encode("a") == [0, 1, 3, 2]
    assert tokenizer.encode_plain(["a b"]) == [[3, 4]]
    assert tokenizer.encode_with_places("a b") == ([3, 4], [(0, 1), (2, 3)])


def test_default_tokenizer_adds_none() -> None:
    assert (default_tokenizer().special_count, default_tokenizer().leading_special_count) == (0, 0)


def test_tokenizers_of_the_same_content_are_equal(tmp_path: Path) -> None:
    content = SHIPPED.read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content)
    of_folder, of_file = read_tokenizer(tmp_path), read_tokenizer(tmp_path / "tokenizer.json")
    assert of_folder == of_file == Tokenizer(content) == default_tokenizer()
    assert hash(of_folder) == hash(of_file)
    assert Tokenizer(content + b" ") != of_file


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"not json", json.dumps({"model": {"type": "BPE"}}).encode()])
def test_content_that_is_no_tokenizer_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidInputError, match=r"tokenizer: mine is no tokenizer\.json"):
        Tokenizer(content, label="mine")


def test_content_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="tokenizer: mine is not text in UTF-8"):
        Tokenizer(b"\xff\x00", label="mine")


def test_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"tokenizer .* not found; give a tokenizer\.json"):
        read_tokenizer(tmp_path)


def test_tokenizer_that_fails_on_text_is_named() -> None:
    """A vocabulary without the token for unknown words is found when the first unknown word comes."""
    tokenizer = LoadedTokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))  # noqa: S106 not a secret
    loaded = Tokenizer(tokenizer.to_str().encode(), label="mine")
    with pytest.raises(PreconditionError, match="mine cannot encode text"):
        loaded.count("b")
