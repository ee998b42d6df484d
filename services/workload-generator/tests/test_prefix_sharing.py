import math
from functools import cache

import numpy as np
import pytest
from tokenizers import Tokenizer as LoadedTokenizer
from tokenizers import models, pre_tokenizers, processors, trainers

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_workload_generator.prompts.corpus import default_corpus
from llmpilot_workload_generator.prompts.rendering import RenderedRequest, Renderer, RenderOptions
from llmpilot_workload_generator.prompts.tokenizer import Tokenizer, default_tokenizer
from llmpilot_workload_generator.sampling.sampler import Sample

MOST_OFF = 2


def drawn(lengths: object, *, start: int = 0) -> Sample:
    inputs = np.asarray(lengths)
    return Sample(
        columns={"input_tokens": inputs, "output_tokens": np.full(len(inputs), 7)}, start=start, arrival_nanos=None
    )


def replayed(lengths: list[int], ids: list[list[int]], block_tokens: int, **columns: object) -> Sample:
    others = {name: np.asarray(column) for name, column in columns.items()}
    return Sample(
        columns={"input_tokens": np.array(lengths), "output_tokens": np.full(len(lengths), 7), **others},
        start=0,
        arrival_nanos=None,
        prefix_ids=np.array([one for of_request in ids for one in of_request], np.int64),
        prefix_starts=np.cumsum([0, *map(len, ids)]),
        prefix_block_tokens=block_tokens,
    )


@cache
def with_specials() -> Tokenizer:
    """A WordPiece of few entries, so that words have up to eight tokens, with two tokens before and one behind."""
    tokenizer = LoadedTokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106 not a secret
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[A]", "[B]", "[C]", "[UNK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(default_corpus().splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[A] [B] $A [C]", special_tokens=[("[A]", 0), ("[B]", 1), ("[C]", 2)]
    )
    return Tokenizer(tokenizer.to_str().encode(), label="mine")


@pytest.fixture(params=[default_tokenizer, with_specials])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made: Tokenizer = request.param()
    return made


def common_tokens(first: list[int], second: list[int]) -> int:
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def ids_of(tokenizer: Tokenizer, requests: list[RenderedRequest]) -> list[list[int]]:
    return [tokenizer.encode(request.prompts[0]) for request in requests]


@pytest.mark.parametrize("ratio", [0.1, 0.29, 0.5, 0.93])
def test_prompts_of_a_group_share_the_asked_part_within_two_tokens(tokenizer: Tokenizer, ratio: float) -> None:
    options = RenderOptions(tokenizer=tokenizer, shared_prefix_ratio=ratio, prefix_group_count=3)
    lengths = np.repeat(np.arange(60, 1500, 37), 6)
    requests = Renderer(options).render(drawn(lengths))
    found = ids_of(tokenizer, requests)
    assert list(map(len, found)) == lengths.tolist()
    for index in range(0, len(lengths), 6):
        for member in range(index, index + 3):
            asked = math.floor(ratio * int(lengths[index]) + 1e-9)
            shared = common_tokens(found[member], found[member + 3])
            assert abs(shared - asked) <= MOST_OFF
            assert requests[member].shared_prefix_tokens <= shared <= requests[member].shared_prefix_tokens + 1
            assert asked - MOST_OFF <= requests[member].shared_prefix_tokens <= asked


def test_prompts_of_a_group_share_as_much_as_the_shorter_part_whatever_their_lengths() -> None:
    requests = Renderer(RenderOptions(shared_prefix_ratio=0.5)).render(drawn([5000, 200, 130_000, 47]))
    found = ids_of(default_tokenizer(), requests)
    assert list(map(len, found)) == [5000, 200, 130_000, 47]
    for first in range(4):
        for second in range(first):
            asked = min(len(found[first]), len(found[second])) // 2
            assert abs(common_tokens(found[first], found[second]) - asked) <= MOST_OFF


def test_groups_share_nothing_of_their_first_block_and_their_members_nothing_more() -> None:
    requests = Renderer(RenderOptions(shared_prefix_ratio=0.5, prefix_group_count=500)).render(drawn([100] * 1000))
    found = ids_of(default_tokenizer(), requests)
    assert len({tuple(ids[:16]) for ids in found}) == 500
    assert len({tuple(ids[50:68]) for ids in found}) == 1000


def test_prompts_that_are_shared_wholly_are_the_same() -> None:
    requests = Renderer(RenderOptions(shared_prefix_ratio=1.0)).render(drawn([333, 333, 7, 1]))
    assert requests[0].prompts == requests[1].prompts
    assert list(map(len, ids_of(default_tokenizer(), requests))) == [333, 333, 7, 1]
    assert 331 <= requests[0].shared_prefix_tokens <= 333


def test_other_seeds_share_nothing() -> None:
    found = [
        ids_of(default_tokenizer(), Renderer(RenderOptions(seed=seed, shared_prefix_ratio=1.0)).render(drawn([50])))[0]
        for seed in range(50)
    ]
    assert len({tuple(ids[:16]) for ids in found}) == 50


def test_equal_leading_blocks_of_a_trace_are_equal_leading_tokens(tokenizer: Tokenizer) -> None:
    """Blocks are those of the server: its own leading tokens are in the first one."""
    ids = [[1, 2, 3], [1, 2, 4], [1, 5, 3], [6, 2, 3], [1, 2, 3]]
    lengths = [1400, 1500, 1300, 1111, 1400]
    requests = Renderer(RenderOptions(tokenizer=tokenizer)).render(replayed(lengths, ids, 512))
    found = ids_of(tokenizer, requests)
    assert list(map(len, found)) == lengths
    assert requests[0].prompts == requests[4].prompts
    shared = {(0, 1): 1024, (0, 2): 512, (1, 2): 512, (0, 3): tokenizer.leading_special_count}
    for (first, second), tokens in shared.items():
        assert tokens <= common_tokens(found[first], found[second]) <= tokens + 1  # the joiner


def test_blocks_of_random_traces_are_exact(tokenizer: Tokenizer) -> None:
    random = np.random.default_rng(0)
    for block_tokens in (24, 64, 513):
        lengths = random.integers(tokenizer.special_count + 1, 6 * block_tokens, 200).tolist()
        chains = [random.integers(0, 3, -(-length // block_tokens)) for length in lengths]
        ids = [[int("1" + "".join(map(str, chain[: end + 1]))) for end in range(len(chain))] for chain in chains]
        requests = Renderer(RenderOptions(tokenizer=tokenizer)).render(replayed(lengths, ids, block_tokens))
        found = ids_of(tokenizer, requests)
        assert list(map(len, found)) == lengths
        starts: dict[int, list[int]] = {}
        for of_request, tokens in zip(ids, found, strict=True):
            for place, block in enumerate(of_request):
                end = (place + 1) * block_tokens
                if end <= len(tokens) - 1:
                    assert starts.setdefault(block, tokens[:end]) == tokens[:end]
        full = [tuple(tokens) for tokens in starts.values()]
        assert len(set(full)) == len(full)


def test_tokens_beyond_the_ids_are_the_requests_own() -> None:
    requests = Renderer(RenderOptions()).render(replayed([1000, 1000, 300, 300], [[1], [1], [], []], 512))
    found = ids_of(default_tokenizer(), requests)
    assert list(map(len, found)) == [1000, 1000, 300, 300]
    assert 512 <= common_tokens(found[0], found[1]) <= 513
    assert [request.shared_prefix_tokens for request in requests] == [512, 512, 0, 0]
    assert found[2][:16] != found[3][:16]


def test_ids_beyond_the_tokens_are_left_out() -> None:
    (request,) = Renderer(RenderOptions()).render(replayed([600], [[1, 2, 3, 4]], 512))
    assert default_tokenizer().count(request.prompts[0]) == 600
    assert request.shared_prefix_tokens == 600


def test_prompts_of_a_batch_share_all_blocks_but_the_last() -> None:
    (request,) = Renderer(RenderOptions()).render(replayed([1200], [[1, 2, 3]], 512, batch_size=[3]))
    found = [default_tokenizer().encode(prompt) for prompt in request.prompts]
    assert list(map(len, found)) == [1200] * 3
    assert len({tuple(ids[:1024]) for ids in found}) == 1
    assert len({tuple(ids) for ids in found}) == 3


def test_blocks_too_short_to_hold_an_id_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"prefix_block_tokens: must be >= 9 .*, is 4"):
        Renderer(RenderOptions()).render(replayed([100], [[1, 2]], 4))


def test_words_stand_in_where_the_corpus_cannot_be_cut_often_enough() -> None:
    """Under a tokenizer that knows only short words whole, a group's text is made of those."""
    text = " ".join(f"the extraordinarily incomprehensible {word} and" for word in default_corpus().split()[:3000])
    options = RenderOptions(tokenizer=with_specials(), corpus=text, shared_prefix_ratio=0.5)
    requests = Renderer(options).render(drawn([400, 400, 399, 398, 397]))
    found = ids_of(with_specials(), requests)
    assert list(map(len, found)) == [400, 400, 399, 398, 397]
    assert abs(common_tokens(found[0], found[1]) - 200) <= MOST_OFF


def test_a_share_beside_the_blocks_of_a_trace_is_refused() -> None:
    """It would be neither the share asked for nor the trace's."""
    with pytest.raises(InvalidInputError, match="shared_prefix_ratio: must be 0 where the trace says"):
        Renderer(RenderOptions(shared_prefix_ratio=0.5)).render(replayed([40], [[1, 2]], 20))
