"""The numbers of TGIS's interface, listed by hand: clients and servers of others send them."""

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor

from fmaas import generation_pb2

FILE = generation_pb2.DESCRIPTOR

FIELDS = {
    "BatchedGenerationRequest": "1 string model_id, 2 string? prefix_id, 4 string? adapter_id, "
    "3 GenerationRequest* requests, 10 Parameters params",
    "SingleGenerationRequest": "1 string model_id, 2 string? prefix_id, 4 string? adapter_id, "
    "3 GenerationRequest request, 10 Parameters params",
    "BatchedGenerationResponse": "1 GenerationResponse* responses",
    "GenerationRequest": "2 string text",
    "GenerationResponse": "6 uint32 input_token_count, 2 uint32 generated_token_count, 4 string text, "
    "7 StopReason stop_reason, 11 string stop_sequence, 10 uint64 seed, 8 TokenInfo* tokens, 9 TokenInfo* input_tokens",
    "Parameters": "1 DecodingMethod method, 2 SamplingParameters sampling, 3 StoppingCriteria stopping, "
    "4 ResponseOptions response, 5 DecodingParameters decoding, 6 uint32 truncate_input_tokens",
    "DecodingParameters": "1 float repetition_penalty, 2 DecodingParameters.LengthPenalty? length_penalty, "
    "3 DecodingParameters.ResponseFormat|guided format, 4 string|guided json_schema, 5 string|guided regex, "
    "6 DecodingParameters.StringChoices|guided choice, 7 string|guided grammar",
    "DecodingParameters.LengthPenalty": "1 uint32 start_index, 2 float decay_factor",
    "DecodingParameters.StringChoices": "1 string* choices",
    "SamplingParameters": "1 float? temperature, 2 uint32 top_k, 3 float top_p, 4 float typical_p, 5 uint64? seed",
    "StoppingCriteria": "1 uint32 max_new_tokens, 2 uint32 min_new_tokens, 3 uint32 time_limit_millis, "
    "4 string* stop_sequences, 5 bool? include_stop_sequence",
    "ResponseOptions": "1 bool input_text, 2 bool generated_tokens, 3 bool input_tokens, 4 bool token_logprobs, "
    "5 bool token_ranks, 6 uint32 top_n_tokens",
    "TokenInfo": "2 string text, 3 float logprob, 4 uint32 rank, 5 TokenInfo.TopToken* top_tokens",
    "TokenInfo.TopToken": "2 string text, 3 float logprob",
    "BatchedTokenizeRequest": "1 string model_id, 6 string? prefix_id, 7 string? adapter_id, "
    "2 TokenizeRequest* requests, 3 bool return_tokens, 4 bool return_offsets, 5 uint32 truncate_input_tokens",
    "BatchedTokenizeResponse": "1 TokenizeResponse* responses",
    "TokenizeRequest": "1 string text",
    "TokenizeResponse": "1 uint32 token_count, 2 string* tokens, 3 TokenizeResponse.Offset* offsets",
    "TokenizeResponse.Offset": "1 uint32 start, 2 uint32 end",
    "ModelInfoRequest": "1 string model_id",
    "ModelInfoResponse": "1 ModelInfoResponse.ModelKind model_kind, 2 uint32 max_sequence_length, "
    "3 uint32 max_new_tokens",
}
"""By message: number, type and name; "*" for repeated, "?" for optional, "|" before the name of a oneof."""

VALUES = {
    "DecodingMethod": "0 GREEDY, 1 SAMPLE",
    "StopReason": "0 NOT_FINISHED, 1 MAX_TOKENS, 2 EOS_TOKEN, 3 CANCELLED, 4 TIME_LIMIT, 5 STOP_SEQUENCE, "
    "6 TOKEN_LIMIT, 7 ERROR",
    "DecodingParameters.ResponseFormat": "0 TEXT, 1 JSON",
    "ModelInfoResponse.ModelKind": "0 DECODER_ONLY, 1 ENCODER_DECODER",
}

SCALARS = {2: "float", 4: "uint64", 8: "bool", 9: "string", 13: "uint32"}
"""google.protobuf.FieldDescriptorProto.Type."""

METHODS = {
    "Generate": ("fmaas.BatchedGenerationRequest", "fmaas.BatchedGenerationResponse", False),
    "GenerateStream": ("fmaas.SingleGenerationRequest", "fmaas.GenerationResponse", True),
    "Tokenize": ("fmaas.BatchedTokenizeRequest", "fmaas.BatchedTokenizeResponse", False),
    "ModelInfo": ("fmaas.ModelInfoRequest", "fmaas.ModelInfoResponse", False),
}


def all_messages() -> dict[str, Descriptor]:
    top = list(FILE.message_types_by_name.values())
    nested = [inner for outer in top for inner in outer.nested_types]
    return {each.full_name.removeprefix("fmaas."): each for each in (*top, *nested)}


def all_enums() -> dict[str, EnumDescriptor]:
    nested = [enum for message in all_messages().values() for enum in message.enum_types]
    return {each.full_name.removeprefix("fmaas."): each for each in (*FILE.enum_types_by_name.values(), *nested)}


def written(message: Descriptor) -> list[str]:
    fields = []
    for field in message.fields:
        named = field.message_type or field.enum_type
        kind = named.full_name.removeprefix("fmaas.") if named else SCALARS[field.type]
        mark = ""
        if field.is_repeated:
            mark = "*"
        elif field.containing_oneof is not None:
            oneof = field.containing_oneof.name
            mark = "?" if oneof == f"_{field.name}" else f"|{oneof}"
        fields.append(f"{field.number} {kind}{mark} {field.name}")
    return sorted(fields)


def test_the_package_is_the_one_that_clients_call() -> None:
    assert FILE.package == "fmaas"
    assert list(FILE.services_by_name) == ["GenerationService"]


def test_every_message_and_enum_is_listed() -> None:
    assert set(all_messages()) == set(FIELDS)
    assert set(all_enums()) == set(VALUES)


@pytest.mark.parametrize("name", FIELDS)
def test_fields_have_the_numbers_and_types_of_the_interface(name: str) -> None:
    assert written(all_messages()[name]) == sorted(FIELDS[name].split(", "))


@pytest.mark.parametrize("name", VALUES)
def test_enum_values_have_the_numbers_of_the_interface(name: str) -> None:
    assert [f"{value.number} {value.name}" for value in all_enums()[name].values] == VALUES[name].split(", ")


def test_methods_take_and_give_what_the_interface_says() -> None:
    methods = FILE.services_by_name["GenerationService"].methods
    assert {
        method.name: (method.input_type.full_name, method.output_type.full_name, method.server_streaming)
        for method in methods
    } == METHODS
    assert not any(method.client_streaming for method in methods)
