"""What the server probe sends, reads and concludes, without a server."""

from pathlib import Path

import pytest

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.step_memory.batch import Batch, Rows
from llmpilot_tuner.domain.limits import Limits
from llmpilot_tuner.domain.search import Problem
from llmpilot_tuner.domain.servers import TGI, TGIS_FLASH, TGIS_PADDED, VLLM, ServerRules
from llmpilot_tuner.server_probe.batch_requests import RequestGroup, batch_requests
from llmpilot_tuner.server_probe.evidence import lower_weight
from llmpilot_tuner.server_probe.live_tokens import LiveTokens
from llmpilot_tuner.server_probe.metrics import largest, vllm_cache_tokens
from llmpilot_tuner.server_probe.prompts import Prompts
from llmpilot_tuner.server_probe.server_log import is_out_of_memory, read_log
from llmpilot_tuner.server_probe.session import filled_command


def limits(rules: ServerRules = TGIS_FLASH, *, prefill_limit: int | None = None, is_t5: bool = False) -> Limits:
    return Limits(
        rules=rules,
        longest_sequence=512,
        most_new_tokens=128,
        most_requests=16,
        prefill_limit=prefill_limit,
        is_encoder_decoder=is_t5,
    )


def test_prefills_are_sent_as_they_are_with_one_output_token() -> None:
    batch = Batch(case="prefill_long", prefill=(Rows(request_count=4, input_tokens=511, output_tokens=1),))
    requests = batch_requests(batch, limits())
    assert requests.first == (RequestGroup(request_count=4, input_tokens=511, output_tokens=1),)
    assert requests.then == ()


def test_a_decode_state_is_reached_by_long_inputs_and_few_output_tokens() -> None:
    batch = Batch(case="decode_long", decode=(Rows(request_count=4, input_tokens=384, output_tokens=128),))
    (group,) = batch_requests(batch, limits()).first
    assert group.input_tokens + group.output_tokens == 512
    assert group.output_tokens == 12  # 8 and 4 for the one prefill


def test_requests_stay_longer_where_their_inputs_are_read_in_many_prefills() -> None:
    batch = Batch(case="decode_long", decode=(Rows(request_count=8, input_tokens=384, output_tokens=128),))
    (group,) = batch_requests(batch, limits(TGI, prefill_limit=1024)).first
    assert (group.input_tokens, group.output_tokens) == (512 - 88, 88)  # 8 and 20 for each of 4 prefills of 2 requests
    (patient,) = batch_requests(batch, limits(TGI, prefill_limit=1024), patience=4).first
    assert (patient.input_tokens, patient.output_tokens) == (384, 128)  # no reply may be longer


def test_residents_come_before_the_prefill() -> None:
    batch = Batch(
        case="mixed_tokens",
        prefill=(Rows(request_count=2, input_tokens=300, output_tokens=1, context_tokens=100),),
        residents=(Rows(request_count=3, input_tokens=384, output_tokens=128),),
    )
    requests = batch_requests(batch, limits(VLLM, prefill_limit=2048))
    assert [group.token_count for group in requests.first] == [3 * 512]
    assert requests.then == (RequestGroup(request_count=2, input_tokens=400, output_tokens=1),)


def test_an_input_is_no_longer_than_the_server_admits() -> None:
    batch = Batch(case="decode_long", decode=(Rows(request_count=1, input_tokens=511, output_tokens=1),))
    (group,) = batch_requests(batch, limits(), longest_input=450).first
    assert (group.input_tokens, group.output_tokens) == (450, 62)


def test_an_encoder_decoders_tokens_are_not_exchanged() -> None:
    batch = Batch(case="decode_long", decode=(Rows(request_count=4, input_tokens=1, output_tokens=100),))
    (group,) = batch_requests(batch, limits(TGIS_PADDED, is_t5=True)).first
    assert (group.input_tokens, group.output_tokens) == (1, 100)


def test_no_two_prompts_begin_alike_and_a_seed_repeats_them() -> None:
    prompts, again = (Prompts(vocabulary_size=2048, seed=3) for _ in range(2))
    made = [tuple(prompts.token_ids(40)) for _ in range(50)]
    assert len({ids[:16] for ids in made}) == 50  # a block of vLLM's prefix cache
    assert all(len(ids) == 40 and min(ids) >= 100 and max(ids) < 2048 for ids in made)
    assert made == [tuple(again.token_ids(40)) for _ in range(50)]


def test_a_text_has_more_words_than_the_tokens_it_is_cut_to() -> None:
    assert len(Prompts(vocabulary_size=2048, seed=3).text(100).split()) == 101


def test_live_tokens_are_those_of_replies_under_way() -> None:
    live = LiveTokens()
    live.grew(1, input_tokens=10, output_tokens=1)
    live.watched_serial = 3
    live.grew(2, input_tokens=20, output_tokens=1)
    live.grew(1, input_tokens=10, output_tokens=5)
    live.grew(3, input_tokens=7, output_tokens=1)
    live.ended(1)
    live.ended(4, is_early=True)
    assert (live.held, live.most_held) == (29, 44)
    assert live.held_when_watched == 36
    assert (live.started_count, live.early_count) == (4, 1)


def test_a_request_that_has_its_last_token_holds_nothing_any_more() -> None:
    """Its reply may end after the server has given its place away; the same numbers are said once more by then."""
    live = LiveTokens()
    live.grew(1, input_tokens=10, output_tokens=1)
    live.grew(1, input_tokens=10, output_tokens=2, is_last=True)
    live.grew(2, input_tokens=10, output_tokens=1)
    live.grew(1, input_tokens=10, output_tokens=2, is_last=True)
    assert (live.held, live.most_held) == (11, 12)
    live.ended(1)
    assert (live.held, live.most_held) == (11, 12)


METRICS = """\
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="300"} 1.0
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="1",num_gpu_blocks="290"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="a \\"b\\" c"} 0.5
broken{ 3
tgi_queue_size 7
"""


def test_metrics_give_the_room_of_the_engine_that_has_least() -> None:
    assert vllm_cache_tokens(METRICS) == 290 * 16
    assert largest(METRICS, "vllm:kv_cache_usage_perc") == 0.5
    assert largest(METRICS, "tgi_queue_size") == 7
    assert largest(METRICS, "broken") is None
    newer = 'vllm:cache_config_info{block_size="32",kv_cache_size_tokens="2048",num_gpu_blocks="64"} 1.0'  # vLLM 0.32
    assert vllm_cache_tokens(newer) == 2048
    assert vllm_cache_tokens('vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1.0') is None


@pytest.mark.parametrize(
    "text",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "RuntimeError: Not enough memory to handle 4096 prefill tokens. You need to decrease",
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
        "ValueError: To serve at least one request with the models's max seq len (8192), (1.0 GiB KV cache is needed, "
        "which is larger than the available KV cache memory (0.5 GiB).",
        "ValueError: Free memory on device (10.1/79.1 GiB) on startup is less than desired GPU memory utilization "
        "(0.9, 71.2 GiB).",
    ],
)
def test_servers_words_for_memory_are_known(text: str) -> None:
    assert is_out_of_memory(f"INFO something else\n{text}\nINFO more")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "RuntimeError: CUDA error: an illegal memory access was encountered",
        "maximum batch weight 4,000 tokens, more than the 1,532 that are safe: out of memory beyond 2,358 tokens",
        "ConnectionResetError: [Errno 104] Connection reset by peer",
    ],
)
def test_other_words_are_not_taken_for_memory(text: str) -> None:
    assert not is_out_of_memory(text)


def test_a_log_gives_its_numbers() -> None:
    facts = read_log(
        "INFO Model loading took 14.99 GiB and 3.2 seconds\n"
        "INFO Overriding num_gpu_blocks=2000 with num_gpu_blocks_override=1000\n"
        "INFO GPU KV cache size: 16,000 tokens\n"
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 "
        "GiB of which 512.00 MiB is free.\n"
    )
    assert facts.weight == 16_000
    assert facts.weight_bytes == round(14.99 * 2**30)
    assert facts.room_ratio == 2.0
    assert facts.missing_bytes == 2 * 2**30


def problem() -> Problem:
    """100 bytes of weights and one for each token."""
    return Problem(
        lowest=10,
        highest=10_000,
        granule=10,
        precision=0.01,
        capacity_bytes=1100,
        cases=lambda weight: (Batch(case="decode", decode=(Rows(request_count=1, input_tokens=weight),)),),
        predict=lambda batch: 100 + batch.token_count,
        weight_bytes=100,
    )


def test_a_lower_weight_needs_less_by_what_was_missing() -> None:
    assert lower_weight(problem(), 1000, missing_bytes=80) == 900  # 1,100 - 1.25 x 80 = 100 + 900


def test_without_numbers_three_tenths_of_the_memory_are_not_counted_on() -> None:
    assert lower_weight(problem(), 1000) == 700


def test_what_the_server_has_room_for_is_believed_below_what_failed() -> None:
    assert lower_weight(problem(), 1000, room_tokens=955) == 950
    assert lower_weight(problem(), 1000, room_tokens=5000) == 990


def test_a_lower_weight_is_never_below_the_lowest() -> None:
    assert lower_weight(problem(), 20, missing_bytes=10**9) == 10


SETTINGS = {"LLMPILOT_MAX_BATCH_WEIGHT": "4000", "MAX_BATCH_SIZE": "16", "LLMPILOT_VLLM_ARGS": "--a=1 --b=2"}


def test_a_command_is_filled_in() -> None:
    command = ("serve", "--weight={weight}", "{LLMPILOT_VLLM_ARGS}", "-n{MAX_BATCH_SIZE}", "{settings_file}", "{{x}}")
    filled = filled_command(command, SETTINGS, settings_file=Path("/a b/server.env"))
    assert filled == ("serve", "--weight=4000", "--a=1", "--b=2", "-n16", "/a b/server.env", "{x}")


@pytest.mark.parametrize("argument", ["{wieght}", "{", "{0}", "{weight.x}"])
def test_a_name_that_no_setting_has_is_refused(argument: str) -> None:
    with pytest.raises(InvalidInputError, match=r"cannot be filled in: it may have \{weight\}, \{settings_file\}"):
        filled_command((argument,), SETTINGS, settings_file=Path("server.env"))
