"""A tuning as one HTML file that needs nothing else: no network, no script, the plot inline.

Invariant: every text in it is escaped, so that what an allocator says cannot become part of the page.
"""

from jinja2 import Environment, PackageLoader, StrictUndefined

from llmpilot_tuner.outputs.plots import memory_plot
from llmpilot_tuner.outputs.report import Report
from llmpilot_tuner.outputs.summary import facts, margin_words
from llmpilot_tuner.outputs.words import count, memory, seconds


def html_report(report: Report) -> str:
    """Return the page."""
    environment = Environment(
        loader=PackageLoader("llmpilot_tuner.outputs"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"memory": memory, "count": count, "seconds": seconds}
    return environment.get_template("report.html.jinja").render(
        report=report,
        facts=facts(report),
        margin=margin_words(report),
        plot=memory_plot(report),
        shares=_shares(report),
        headroom=sorted(report.headroom, key=lambda case: case.headroom_bytes),
    )


def _shares(report: Report) -> list[tuple[str, str, str]]:
    """Return where the memory of a GPU goes in its tightest case: name, CSS class, percent of it."""
    whole = report.memory.gpu_memory_bytes
    parts = {
        "set aside": report.memory.set_aside_bytes,
        "weights": report.memory.llm_weights_bytes,
        "cache": report.memory.cache_bytes,
        "working memory": report.memory.working_bytes,
    }
    return [
        (f"{name} {memory(size)}", name.replace(" ", "-"), f"{min(100.0, 100 * size / whole):.2f}")
        for name, size in parts.items()
        if size > 0
    ]
