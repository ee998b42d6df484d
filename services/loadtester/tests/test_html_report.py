import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from llmpilot_contracts.record_schema import STATUSES
from llmpilot_loadtester.domain.records import RecordBatch, empty_records
from llmpilot_loadtester.domain.results import Verdict
from llmpilot_loadtester.domain.spec import Load, LoadKind, ServiceLevel, Stage, UserStep
from llmpilot_loadtester.outputs.csv_table import csv_table
from llmpilot_loadtester.outputs.html_report import html_report
from llmpilot_loadtester.outputs.number_format import percent, shown
from llmpilot_loadtester.outputs.plots import Axis, Series, line_chart
from llmpilot_loadtester.outputs.run_facts import RunFacts, StageFacts
from llmpilot_loadtester.outputs.stage_report import StageReport, stage_report
from llmpilot_loadtester.outputs.stage_series import stage_series

MS = 1_000_000
EVIL = "</td></table><script>alert(1)</script><img src=x onerror=alert(2)> \"'&"
OK = Verdict(is_valid=True)
NOT_VALID = Verdict(is_valid=False, reasons=("the client used 97 % of its core",))
VOID = {"meta", "link", "br", "img", "input", "hr"}


def one_after_another(count: int, *, failing: int = 0, error: str = "broken") -> RecordBatch:
    """Requests 100 ms apart: the first token after 20 ms, two more 10 ms apart, the end at once; the last ones fail."""
    send = np.arange(count) * 100 * MS
    is_bad = np.arange(count) >= count - failing
    nothing = np.zeros(count, np.int64)
    return RecordBatch(
        request_index=np.arange(count),
        user_index=nothing,
        scheduled_nanos=send,
        send_nanos=send,
        first_byte_nanos=send + 19 * MS,
        end_nanos=send + 40 * MS,
        input_tokens=nothing + 10,
        reasoning_tokens=nothing - 1,
        token_count_source=nothing,
        status=np.where(is_bad, STATUSES.index("server_error"), 0),
        finish_reason=nothing,
        stamp_source=nothing,
        errors=tuple(error if bad else "" for bad in is_bad),
        chunk_starts=np.arange(count + 1) * 3,
        chunk_nanos=(send[:, None] + np.array([20, 30, 40]) * MS).ravel(),
        chunk_tokens=np.ones(3 * count, np.int64),
    )


def report_of(batch: RecordBatch, verdict: Verdict = OK, *, users_count: int = 1) -> StageReport:
    load = Load(kind=LoadKind.USERS, user_steps=(UserStep(at_seconds=0, users_count=users_count),))
    facts = StageFacts(
        stage_index=users_count,
        stage=Stage(load=load, warm_up_seconds=1.0, measure_seconds=4.0),
        start_unix_nanos=1_763_740_000 * 10**9,
        verdict=verdict,
    )
    return stage_report(facts, batch, ServiceLevel(), seed=0)


class Page(HTMLParser):
    """Tags, attributes and text of a page; every tag that is opened must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: D102 of the parser
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: D102 of the parser
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:  # noqa: D102 of the parser
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:  # noqa: D102 of the parser
        if self.open and self.open[-1] != "style":
            self.text += f"{data} "


def page_of(*reports: StageReport, **facts: object) -> Page:
    return Page(html_report(RunFacts(**facts), reports))  # type: ignore[arg-type]


def test_what_a_server_says_cannot_become_part_of_the_page() -> None:
    evil = {"served_model": EVIL, "target_url": EVIL, "requests": EVIL, "notes": (EVIL,), "name": EVIL}
    verdict = Verdict(is_valid=False, reasons=(EVIL,))
    page = page_of(report_of(one_after_another(50, failing=5, error=EVIL), verdict), **evil)
    assert {"script", "img"} & set(page.tags) == set()
    assert [name for name, _ in page.attributes if name.startswith("on")] == []
    assert page.text.count(EVIL) >= 7


def test_page_needs_nothing_from_elsewhere() -> None:
    text = html_report(RunFacts(), [report_of(one_after_another(50))])
    page = Page(text)
    assert {"script", "link", "img", "iframe", "object"} & set(page.tags) == set()
    assert [name for name, _ in page.attributes if name in {"src", "href", "srcset"}] == []
    assert re.findall(r"url\(|@import|https?:", text) == []
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_plots_are_well_formed_and_of_every_kind() -> None:
    reports = [report_of(one_after_another(50), users_count=users) for users in (1, 2)]
    text = html_report(RunFacts(), reports)
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    labels = [ET.fromstring(chart).attrib["aria-label"] for chart in charts]  # noqa: S314 it is our own
    timelines = ["requests", "tokens/s", "TTFT, ms"]
    assert labels == [
        "TTFT, ms by output tokens/s",
        "ITL, ms by output tokens/s",
        *["share of values by ms"] * 3,
        *[f"{label} by seconds since the start of the stage" for label in timelines * 2],
    ]


@pytest.mark.parametrize("simulated", [True, False])
def test_simulated_numbers_are_called_so(simulated: bool) -> None:
    page = page_of(report_of(one_after_another(50)), simulated=simulated)
    assert ("says of itself that it is a simulator" in page.text) == simulated


def test_numbers_that_do_not_count_are_called_so_with_the_reason() -> None:
    batch = one_after_another(50)
    page = page_of(report_of(batch), report_of(batch, NOT_VALID, users_count=8))
    assert "1 user: numbers valid" in page.text
    assert "8 users: numbers not valid" in page.text
    assert "because the client used 97 % of its core" in page.text
    assert ("class", "hollow c0") in page.attributes


def test_errors_are_counted_by_kind() -> None:
    page = page_of(report_of(one_after_another(50, failing=10, error="no memory left")))
    words = re.sub(r"\s+", " ", page.text)
    assert "server error 10 no memory left" in words
    assert "10 (25 %)" in words  # 40 of the 50 were sent in the window of 1 s to 5 s


@pytest.mark.parametrize("batch", [empty_records(), one_after_another(50, failing=50), one_after_another(1)])
def test_stage_without_successes_is_reported_with_dashes(batch: RecordBatch) -> None:
    page = page_of(report_of(batch))
    assert "–" in page.text
    assert "nan" not in page.text.lower()


def test_csv_has_a_row_a_stage_and_an_empty_cell_for_nothing() -> None:
    reports = [report_of(one_after_another(50)), report_of(empty_records(), NOT_VALID, users_count=2)]
    header, *rows = csv_table(RunFacts(served_model="m"), reports).splitlines()
    first, second = (dict(zip(header.split(","), row.split(","), strict=True)) for row in rows)
    assert (first["load"], first["valid"], first["request_count"]) == ("1 user", "true", "40")
    assert [float(first[f"{name}_median_ms"]) for name in ("ttft", "itl", "end_to_end")] == [20, 10, 40]
    assert (second["valid"], second["not_valid_because"]) == ("false", NOT_VALID.reasons[0])
    assert (second["ttft_median_ms"], second["error_rate"], second["ttft_count"]) == ("", "", "0")


def test_timeline_counts_requests_under_way_and_tokens() -> None:
    """Each request is under way for 40 of 100 ms and brings 3 tokens."""
    report = report_of(one_after_another(50))
    series = stage_series(one_after_another(50), report.facts.window)
    width_seconds = 5.0 / len(series.bin_seconds)
    assert series.in_flight.sum() * width_seconds == pytest.approx(50 * 0.04)
    assert series.tokens_per_second.sum() * width_seconds == pytest.approx(150)
    assert series.in_flight.max() <= 1
    assert np.unique(series.ttft_ms).tolist() == [20.0]
    assert np.unique(series.itl_ms).tolist() == [10.0]


def test_chart_of_nothing_is_nothing_and_a_gap_is_no_line() -> None:
    axis = Axis(label="x")
    nothing = Series(x=np.array([1.0, np.nan]), y=np.array([np.nan, 2.0]))
    gap = Series(x=np.arange(5.0), y=np.array([1, 2, np.nan, 4, 5]))
    assert line_chart(axis, axis, [nothing]) == ""
    path = ET.fromstring(line_chart(axis, axis, [gap])).findall("path")[-1].attrib["d"]  # noqa: S314 it is our own
    assert re.sub(r"[^ML]", "", path) == "MLML"


def test_points_lie_where_their_values_say() -> None:
    """On a logarithmic axis 1, 10, 100 are equally far apart; on a linear one 0, 1, 2 are."""
    series = Series(x=np.array([0.0, 1, 2]), y=np.array([1.0, 10, 100]), point_labels=("a", "b", "c"))
    svg = ET.fromstring(line_chart(Axis(label="x"), Axis(label="y", may_be_log=True), [series]))  # noqa: S314
    circles = svg.findall("circle")
    for name, is_rising in (("cx", True), ("cy", False)):
        first, second, third = (float(circle.attrib[name]) for circle in circles)
        assert second - first == pytest.approx(third - second, abs=0.15)
        assert (third > first) == is_rising


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0.0, "0"), (9.999, "10.0"), (7.123, "7.12"), (45.67, "45.7"), (99.96, "100"), (123.4, "123"),
        (12345.6, "12,346"), (0.01234, "0.0123"), (-3.0, "-3"), (5.0, "5"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert shown(value) == text


def test_shares_are_percent() -> None:
    assert [percent(share) for share in (None, 0.0, 1.0, 0.95, 0.00123, 0.9999)] == [
        "–", "0 %", "100 %", "95 %", "0.123 %", "100 %",
    ]  # fmt: skip


def test_names_of_points_do_not_cover_each_other() -> None:
    line = Series(x=np.array([0.0, 99.9, 100.0]), y=np.array([1.0, 1.0, 1.0]), point_labels=("one", "two", "three"))
    svg = line_chart(Axis(label="x"), Axis(label="y"), [line])
    assert [name in svg.replace(f"<title>{name}:", "") for name in ("one", "two", "three")] == [True, True, False]
    assert "<title>three: 1 at 100</title>" in svg
