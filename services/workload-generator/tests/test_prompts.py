import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as LoadedTokenizer

from llmpilot_contracts.errors import InvalidInputError, NotFoundError, PreconditionError
from llmpilot_workload_generator.prompts.corpus import default_corpus
from llmpilot_workload_generator.prompts.rendering import RenderedRequest, Renderer, RenderOptions
from llmpilot_workload_generator.prompts.request_bodies import Server
from llmpilot_workload_generator.prompts.sampling_parameters import SamplingParameters
from llmpilot_workload_generator.prompts.tokenizer import Tokenizer, default_tokenizer
from llmpilot_workload_generator.sampling.sampler import Sample

BLOCK_TOKENS = 16
LINES = default_corpus().splitlines()


def drawn(input_tokens: object, *, start: int = 0, **columns: object) -> Sample:
    inputs = np.asarray(input_tokens)
    others = {name: np.asarray(column) for name, column in columns.items()}
    return Sample(
        columns={"input_tokens": inputs, "output_tokens": np.full(len(inputs), 7), **others},
        start=start,
        arrival_nanos=None,
    )


def like_llama_2() -> LoadedTokenizer:
    """BPE over the whole text, with a mark for the space and one more before the text."""
    tokenizer = LoadedTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer = LoadedTokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def like_t5() -> LoadedTokenizer:
    """Unigram, with a token behind the text."""
    tokenizer = LoadedTokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=1500,
        special_tokens=special,
        unk_token="<unk>",  # noqa: S106 not a secret
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def like_bert() -> LoadedTokenizer:
    """WordPiece in lower case, with a token on both sides, cut at 512."""
    tokenizer = LoadedTokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106 not a secret
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=1200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(512)
    return tokenizer


def like_llama_3() -> LoadedTokenizer:
    """Byte-level BPE that takes three digits at a time, with a token before the text."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    tokenizer = LoadedTokenizer(models.BPE(ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    begin = "<|begin_of_text|>"
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=[begin],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 0)])
    return tokenizer


def across_words() -> LoadedTokenizer:
    """BPE whose tokens reach over spaces."""
    tokenizer = LoadedTokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=3000, show_progress=False, max_token_length=30)
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def bytes_alone() -> LoadedTokenizer:
    """A token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = LoadedTokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def loaded(make: Callable[[], LoadedTokenizer]) -> Tokenizer:
    return Tokenizer(make().to_str().encode(), label=make.__name__)


@pytest.fixture(scope="module", params=[None, like_llama_2, like_t5, like_bert, like_llama_3])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return default_tokenizer() if request.param is None else loaded(request.param)


def prompts_of(requests: list[RenderedRequest]) -> list[str]:
    return [prompt for request in requests for prompt in request.prompts]


def test_prompts_of_any_length_have_exactly_the_asked_tokens(tokenizer: Tokenizer) -> None:
    least = tokenizer.special_count + 1
    lengths = np.concatenate([np.arange(least, 600), np.arange(600, 5001, 11), [50_001, 65_536, 131_072]])
    requests = Renderer(RenderOptions(tokenizer=tokenizer)).render(drawn(lengths))
    assert tokenizer.count_each(prompts_of(requests)) == lengths.tolist()
    assert [request.input_tokens for request in requests] == lengths.tolist()


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(3, 3000), min_size=1, max_size=20),
    seed=st.integers(0, 2**64 - 1),
    start=st.integers(0, 2**47),
    ratio=st.floats(0, 1),
    group_count=st.integers(1, 5),
)
def test_prompts_are_exact_under_any_seed_and_options(
    lengths: list[int], seed: int, start: int, ratio: float, group_count: int
) -> None:
    options = RenderOptions(seed=seed, shared_prefix_ratio=ratio, prefix_group_count=group_count)
    requests = Renderer(options).render(drawn(lengths, start=start))
    assert default_tokenizer().count_each(prompts_of(requests)) == lengths


def test_no_two_prompts_share_their_first_block(tokenizer: Tokenizer) -> None:
    count = 100_000 if tokenizer == default_tokenizer() else 20_000
    renderer = Renderer(RenderOptions(tokenizer=tokenizer))
    prompts = prompts_of(renderer.render(drawn(np.full(count, BLOCK_TOKENS + tokenizer.special_count))))
    leading = BLOCK_TOKENS - tokenizer.leading_special_count
    assert len({tuple(ids[:leading]) for ids in tokenizer.encode_plain(prompts)}) == count


def test_prompts_of_a_batch_and_of_other_requests_and_seeds_begin_differently() -> None:
    sample = drawn([40, 40, 40], batch_size=[1, 5, 300])
    prompts = [prompt for seed in range(20) for prompt in prompts_of(Renderer(RenderOptions(seed=seed)).render(sample))]
    assert len(prompts) == 20 * 306
    assert len({tuple(ids[:BLOCK_TOKENS]) for ids in default_tokenizer().encode_plain(prompts)}) == len(prompts)
    assert default_tokenizer().count_each(prompts) == [40] * len(prompts)


def test_a_request_is_the_same_however_the_stream_is_cut() -> None:
    lengths = np.random.default_rng(0).integers(1, 30_000, 50)
    sizes = np.arange(50) % 4 + 1
    renderer = Renderer(RenderOptions(seed=3, shared_prefix_ratio=0.4, prefix_group_count=3))
    whole = renderer.render(drawn(lengths, start=100, batch_size=sizes))
    again = Renderer(RenderOptions(seed=3, shared_prefix_ratio=0.4, prefix_group_count=3))
    parts = [
        request
        for begin in (37, 0, 11)
        for request in again.render(drawn(lengths[begin:], start=100 + begin, batch_size=sizes[begin:]))
    ]
    assert sorted(parts[:13], key=lambda request: request.index) == whole[37:]
    assert parts[13:63] == whole


def test_text_of_long_prompts_is_not_the_same_everywhere() -> None:
    """The pieces of a prompt longer than the corpus are other ones in every prompt."""
    first, second = prompts_of(Renderer(RenderOptions()).render(drawn([100_000, 100_000])))
    common = set(first.split("\n")[1:-1]) & set(second.split("\n")[1:-1])
    assert first[5000:6000] != second[5000:6000]
    assert common


def test_prompts_spread_over_the_corpus() -> None:
    """Half of 20,000 prompts' pieces begin in either half: a binomial with sd 71, so 5 sd are 355."""
    corpus = default_corpus()
    prompts = prompts_of(Renderer(RenderOptions()).render(drawn(np.full(20_000, 60))))
    places = np.array([corpus.index(prompt[-150:]) for prompt in prompts])
    assert abs(int((places < len(corpus) / 2).sum()) - 10_000) < 355


def test_rendered_request_carries_what_the_sample_says() -> None:
    sample = Sample(
        columns={
            "output_tokens": np.array([5, 6]),
            "input_tokens": np.array([20, 30]),
            "batch_size": np.array([1, 2]),
            "is_greedy": np.array([1, 0]),
            "temperature": np.array([0.7, 0.0]),
        },
        start=10,
        arrival_nanos=np.array([0, 1_500]),
    )
    first, second = Renderer(RenderOptions(server=Server.TGI)).render(sample)
    assert (first.index, first.input_tokens, first.output_tokens, first.arrival_nanos) == (10, 20, 5, 0)
    assert (second.index, second.input_tokens, second.output_tokens, second.arrival_nanos) == (11, 30, 6, 1_500)
    assert first.sampling == SamplingParameters(greedy=True)
    assert second.sampling == SamplingParameters(greedy=False, temperature=1.0)
    assert [json.loads(body)["inputs"] for body in second.bodies] == list(second.prompts)
    assert len(first.prompts) == 1
    assert len(set(second.prompts)) == 2
    assert second.shared_prefix_tokens == 0


def test_arrivals_and_bodies_may_be_absent() -> None:
    (request,) = Renderer(RenderOptions()).render(drawn([9]))
    assert (request.arrival_nanos, request.bodies) == (None, ())


def test_empty_sample_renders_to_nothing() -> None:
    assert Renderer(RenderOptions()).render(drawn(np.zeros(0, np.int64))) == []


def test_text_of_the_user_is_cut_into_prompts() -> None:
    text = "Der schnelle braune Fuchs springt 42-mal über den faulen Hund, während Käthe 'ruhig' schläft. " * 60
    (prompt,) = prompts_of(Renderer(RenderOptions(corpus=text)).render(drawn([400])))
    assert default_tokenizer().count(prompt) == 400
    assert "über den faulen Hund, während Käthe" in prompt


@pytest.mark.parametrize("make", [across_words, bytes_alone])
def test_tokenizer_that_cannot_be_prepared_for_is_refused(make: Callable[[], LoadedTokenizer]) -> None:
    with pytest.raises(PreconditionError, match=rf"{make.__name__}: .*give another tokenizer"):
        Renderer(RenderOptions(tokenizer=loaded(make)))


def test_text_without_spaces_is_refused() -> None:
    with pytest.raises(PreconditionError, match="give a corpus of words with spaces between them"):
        Renderer(RenderOptions(corpus="我们今天去公园散步" * 300))


def test_text_of_fewer_than_1000_tokens_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"corpus: must have at least 1000 tokens .*, has 14"):
        Renderer(RenderOptions(corpus="The cook washed the pan. The cook washed the pan."))


def test_all_that_is_wrong_with_options_is_said_at_once() -> None:
    options = RenderOptions(
        seed=-1, shared_prefix_ratio=float("nan"), prefix_group_count=0, server=Server.OPENAI_CHAT, served_model=""
    )
    with pytest.raises(InvalidInputError) as caught:
        Renderer(options)
    fields = {violation.field for violation in caught.value.violations}
    assert fields == {"seed", "shared_prefix_ratio", "prefix_group_count", "served_model"}


def test_path_of_a_tokenizer_is_read(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="tokenizer"):
        Renderer(RenderOptions(tokenizer=tmp_path))


@pytest.mark.parametrize("name", ["input_tokens", "output_tokens"])
def test_model_without_lengths_cannot_be_rendered(name: str) -> None:
    columns = {"input_tokens": np.array([5]), "output_tokens": np.array([5])}
    del columns[name]
    with pytest.raises(InvalidInputError, match=f"model: must have the parameter {name} to make requests"):
        Renderer(RenderOptions()).render(Sample(columns=columns, start=0, arrival_nanos=None))


def test_prompt_with_no_token_but_the_tokenizers_own_is_refused() -> None:
    renderer = Renderer(RenderOptions(tokenizer=loaded(like_bert)))
    with pytest.raises(InvalidInputError) as caught:
        renderer.render(drawn([3, 2, 1, 50], batch_size=[1, 0, 1, 1]))
    assert str(caught.value) == (
        "input_tokens: must be from 3 (2 are the tokenizer's own) to 16777216, is 2 in 2 of 4 requests; "
        "conditions leave such requests out; "
        "batch_size: must be from 1 to 65536, is 0 in 1 of 4 requests; conditions leave such requests out"
    )


def test_lengths_of_text_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="input_tokens: must be a column of numbers"):
        Renderer(RenderOptions()).render(drawn(np.array(["5"])))


def test_start_beyond_what_numbers_hold_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="start: must be from 0 to"):
        Renderer(RenderOptions()).render(drawn([5], start=2**48))


def test_a_length_of_zero_is_refused_with_what_to_do() -> None:
    sample = Sample(
        columns={"input_tokens": np.array([30, 30]), "output_tokens": np.array([0, 1])}, start=0, arrival_nanos=None
    )
    with pytest.raises(InvalidInputError, match="is 0 in 1 of 2 requests; conditions leave such requests out"):
        Renderer(RenderOptions()).render(sample)
