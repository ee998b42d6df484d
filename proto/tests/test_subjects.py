import pytest

from llmpilot_contracts.subjects import LOAD_TEST_EVENT, STREAMS, SUBJECTS, Subject


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_a_subject_is_kept_by_its_own_stream_alone(subject: Subject) -> None:
    keeping = [
        stream
        for stream in STREAMS
        if any(subject.name.startswith(pattern.removesuffix(">")) for pattern in stream.subjects)
    ]
    assert keeping == [subject.stream]


def test_names_are_unique() -> None:
    for table in (STREAMS, SUBJECTS):
        assert len({row.name for row in table}) == len(table)


def test_a_subject_travels_in_a_message_of_its_own_package() -> None:
    for subject in SUBJECTS:
        package, _, _ = subject.name.replace(".*", "").rpartition(".")
        assert subject.payload.DESCRIPTOR.file.package == package


def test_the_subject_of_a_resource_has_its_id_where_the_table_has_a_star() -> None:
    subject = LOAD_TEST_EVENT.of("lt-1")
    assert subject.name == "llmpilot.loadtest.v1.lt-1.event"
    assert (subject.payload, subject.stream) == (LOAD_TEST_EVENT.payload, LOAD_TEST_EVENT.stream)
