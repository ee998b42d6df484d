"""The report of a tuning: as JSON, as a page, as a plot, as lines."""

import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.bundled_llms import bundled_config
from llmpilot_perfmodel.step_memory.batch import Batch, Rows
from llmpilot_tuner.domain.plan import plan_of
from llmpilot_tuner.domain.probing import CaseRun, Outcome, Probe, ProbeFacts, ProbeKind
from llmpilot_tuner.domain.result import CaseHeadroom, CurvePoint, Soak, TuningResult
from llmpilot_tuner.domain.spec import TuningSpec
from llmpilot_tuner.outputs.html_report import html_report
from llmpilot_tuner.outputs.plots import memory_plot
from llmpilot_tuner.outputs.report import Report, largest_batch_tokens, read_report, report_json, report_of, report_text
from llmpilot_tuner.outputs.summary import facts, margin_words
from llmpilot_tuner.outputs.words import batch_words, memory, seconds

GIB = 2**30
EVIL = "</td></table><script>alert(1)</script><img src=x onerror=alert(2)> \"'&"
VOID = {"meta", "link", "br", "img", "input", "hr"}

SPEC = TuningSpec(
    config_json=bundled_config("llama-3.1-8b"),
    llm_name="meta-llama/Llama-3.1-8B",
    gpu_name="A100-40GB",
    gpu_memory_bytes=40 * GIB,
    reserved_bytes=GIB,
    longest_sequence=2048,
    most_new_tokens=512,
    most_requests=128,
    prefill_limit=4096,
)
PREFILL = Batch(
    case="mixed_tokens",
    prefill=(Rows(request_count=2, input_tokens=2047, output_tokens=1),),
    residents=(Rows(request_count=46, input_tokens=2000, output_tokens=41),),
    pool_tokens=98_000,
)
DECODE = Batch(
    case="decode_many",
    decode=(Rows(request_count=128, input_tokens=764, output_tokens=1),),
    pool_tokens=98_000,
    copied_tokens=98_000,
)
PASSED = Probe(
    weight=98_000,
    runs=(
        CaseRun(batch=PREFILL, outcome=Outcome.PASSED, peak_bytes=38 * GIB, reserved_bytes=39 * GIB - 10, seconds=1.5),
        CaseRun(batch=DECODE, outcome=Outcome.PASSED, peak_bytes=30 * GIB, live_before_bytes=15 * GIB, seconds=0.5),
    ),
)
FAILED = Probe(
    weight=99_000,
    runs=(
        CaseRun(
            batch=PREFILL, outcome=Outcome.OUT_OF_MEMORY, peak_bytes=38 * GIB, message="CUDA out of memory", seconds=61
        ),
    ),
)
RESULT = TuningResult(
    max_batch_weight=98_000,
    limit="memory",
    facts=ProbeFacts(
        kind=ProbeKind.TORCH,
        device="NVIDIA A100-SXM4-40GB",
        capacity_bytes=39 * GIB,
        weight_bytes=15 * GIB,
        versions=(("driver", "550.54"), ("torch", "2.13.0")),
        notes=("another process holds 1 GiB",),
    ),
    probes=(PASSED, FAILED),
    plain_probe_count=14,
    headroom=(
        CaseHeadroom(
            batch=PREFILL,
            predicted_bytes=38.5 * GIB,
            peak_bytes=38 * GIB,
            reserved_bytes=39 * GIB - 10,
            headroom_bytes=10,
        ),
        CaseHeadroom(
            batch=DECODE, predicted_bytes=30.5 * GIB, peak_bytes=None, reserved_bytes=None, headroom_bytes=8.5 * GIB
        ),
    ),
    soak=Soak(
        step_count=50,
        largest_peak_bytes=38 * GIB,
        largest_reserved_bytes=39 * GIB - 10,
        growth_bytes=2 * 2**20,
        drift_bytes=0,
        lowered_from=(98_500,),
    ),
    margin_weight=500,
    curve=tuple(
        CurvePoint(case=case, weight=weight, predicted_bytes=float(slope * weight + 15 * GIB))
        for weight in (2048, 50_000, 98_000, 112_000)
        for case, slope in (("mixed_tokens", 260_000), ("decode_many", 160_000))
    ),
    half_sequence_weight=101_000,
    predicted_weight=97_000,
    elapsed_seconds=75.25,
    notes=("another process holds 1 GiB", "weights fell"),
)


def made(result: TuningResult = RESULT, spec: TuningSpec = SPEC) -> Report:
    return report_of(result, spec, plan_of(spec))


def unmeasured(kind: ProbeKind) -> TuningResult:
    """The same result as nobody measured it."""
    return replace(RESULT, facts=replace(RESULT.facts, kind=kind), soak=None, margin_weight=0)


class Page(HTMLParser):
    """What a browser sees: tags must close in their order, and nothing may name an address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag and the addresses in it."""
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "action", "srcset"} and not (value or "").startswith("#"):
                self.addresses.append(f"{name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag that closes itself."""
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close the tag that was opened last."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Note a text."""
        self.texts.append(data)


@pytest.mark.parametrize("result", [RESULT, unmeasured(ProbeKind.DRY), replace(RESULT, headroom=(), curve=())])
def test_a_report_that_is_read_is_the_report_that_was_written(result: TuningResult) -> None:
    report = made(result)
    assert read_report(report_text(report)) == report
    assert read_report(report_json(result, SPEC)) == report


def test_the_names_of_version_1_stay() -> None:
    """Others read them; a new name is welcome, one that goes or changes needs a new version."""
    assert {field.name for field in fields(Report)} >= {
        *("format", "version", "made_by", "llm_name", "gpu_name", "gpu_count", "server", "probe", "is_measured"),
        *("evidence", "max_batch_weight", "weight_unit", "largest_batch_tokens", "longest_request_count", "limit"),
        *("predicted_weight", "half_sequence_weight", "granule_weight", "precision_share", "margin_weight", "limits"),
        *("memory", "device", "versions", "headroom", "probes", "plain_probe_count", "soak", "curve", "seed"),
        *("elapsed_seconds", "notes"),
    }


def test_a_report_says_what_was_found_and_how() -> None:
    """47 = 98,000 // 2,048 longest requests fit at once; a note is told once."""
    report = made()
    assert (report.max_batch_weight, report.weight_unit, report.largest_batch_tokens) == (98_000, "tokens", 98_000)
    assert report.longest_request_count == 47
    assert report.is_measured
    assert report.memory.case == "mixed_tokens"
    assert report.memory.cache_bytes >= 98_000 * 131_072  # of Llama-3.1-8B's pool: 2 x 32 x 8 x 128 x 2 bytes a token
    assert [probe.passed for probe in report.probes] == [True, False]
    assert [probe.elapsed_seconds for probe in report.probes] == [2.0, 61]
    assert report.notes == ("another process holds 1 GiB", "weights fell")


def test_the_largest_batch_of_a_server_that_pads_is_that_of_brute_force() -> None:
    spec = replace(
        SPEC, eager_attention=True, prefill_limit=None, longest_sequence=300, most_new_tokens=9, most_requests=20
    )
    limits = plan_of(spec).limits
    for weight in (90_000, 123_457, 1_800_000):
        tokens = [n * length for n in range(1, 21) for length in range(1, 301) if n * length**2 <= weight]
        assert largest_batch_tokens(limits, weight) == max(tokens)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        report_text(replace(made(), version=2)),
        report_text(replace(made(), format="a recipe")),
        report_text(made()).replace('"max_batch_weight": 98000', '"max_batch_weight": "many"'),
    ],
)
def test_what_is_no_report_of_this_version_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="report: "):
        read_report(text)


def test_a_page_needs_nothing_else_and_is_well_formed() -> None:
    text = html_report(made())
    page = Page(text)
    assert page.addresses == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == 1
    assert not re.search(r"https?:|//", text)
    assert "98,000" in "".join(page.texts)


def test_every_text_of_a_page_is_escaped() -> None:
    result = replace(RESULT, facts=replace(RESULT.facts, device=EVIL, versions=((EVIL, EVIL),)), notes=(EVIL,))
    evil_case = replace(PREFILL, case=EVIL)
    run = replace(FAILED.runs[0], batch=evil_case, message=EVIL)
    curve = (*RESULT.curve, CurvePoint(case=EVIL, weight=98_000, predicted_bytes=float(30 * GIB)))
    result = replace(result, probes=(PASSED, replace(FAILED, runs=(run,))), curve=curve)
    spec = replace(SPEC, llm_name=EVIL, gpu_name=EVIL)
    page = Page(html_report(report_of(result, spec, plan_of(spec))))
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.addresses == []


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (ProbeKind.ANALYTIC, "predicted by formulas, not measured"),
        (ProbeKind.DRY, "counted, not allocated"),
        (ProbeKind.TORCH, "measured on the GPU"),
    ],
)
def test_what_was_not_measured_is_said_so(kind: ProbeKind, said: str) -> None:
    report = made(unmeasured(kind))
    assert said in dict(facts(report))["evidence"]
    assert ("confirm it" in html_report(report)) == (not kind.is_measured)


def test_the_margin_comes_with_its_evidence() -> None:
    words = margin_words(made())
    assert words.startswith("500 taken off: 50 steps")
    assert "grew by 2.00 MiB" in words
    assert "lowered from 98,500" in words
    assert "nothing was allocated" in margin_words(made(unmeasured(ProbeKind.DRY)))


def test_a_plot_has_a_line_per_case_the_capacity_and_the_weight() -> None:
    element = ET.fromstring(memory_plot(made()))  # noqa: S314 made here
    texts = {text.text for text in element.iter("text")}
    assert {"mixed_tokens", "decode_many", "capacity", "found: 98,000", "measured", "out of memory"} <= texts
    assert "maximum batch weight, tokens" in texts
    assert "memory of each GPU at the peak, GiB" in texts
    assert sum("axes_" in group.get("id", "") for group in element.iter("g")) == 1


def test_a_plot_is_the_same_for_the_same_report() -> None:
    assert memory_plot(made()) == memory_plot(made())
    assert not re.search(r"https?:|<metadata|<\?xml|DOCTYPE", memory_plot(made()))


def test_there_is_no_plot_of_nothing() -> None:
    report = replace(made(), curve=(), probes=())
    assert memory_plot(report) == ""
    assert "figure" not in Page(html_report(report)).tags


@pytest.mark.parametrize(
    ("byte_count", "words"),
    [
        (None, "–"),
        (0, "0 B"),
        (1023, "1,023 B"),
        (1536, "1.50 KiB"),
        (-3 * 2**20, "-3.00 MiB"),
        (24 * GIB, "24.00 GiB"),
    ],
)
def test_memory_in_words(byte_count: int | None, words: str) -> None:
    assert memory(byte_count) == words


def test_batches_in_words() -> None:
    chunk = Rows(request_count=1, input_tokens=512, context_tokens=1024)
    batch = Batch(case="step", prefill=(chunk,), decode=DECODE.decode, all_logits=True)
    assert batch_words(PREFILL) == "prefill of 2 × 2,047, beside 46 × 2,041"
    assert batch_words(DECODE) == "decode of 128 × 765, 98,000 tokens copied"
    assert batch_words(batch) == "prefill of 1 × 512 after 1,024, decode of 128 × 765, logits of the whole input"


def test_times_in_words() -> None:
    assert seconds(59.94) == "59.9 s"
    assert seconds(125.9) == "2 min 5 s"
