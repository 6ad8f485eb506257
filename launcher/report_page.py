"""The report of a run as one HTML file that needs nothing else: no script, no font, no picture from elsewhere. Pure."""

from __future__ import annotations

import time
from dataclasses import dataclass
from html import escape

from launcher import report_charts as charts
from launcher.report import Attempt, Part, Report
from launcher.report_charts import duration


@dataclass(frozen=True)
class Title:
    """What the page is about."""

    run: str
    recipe: str
    cluster: str
    created: float | None


def page(report: Report, title: Title) -> str:
    """The whole document."""
    names = {
        each.number: (str(each.number), (each.cause or each.state).replace("_", " "))
        for each in report.attempts
    }
    clock = "Time since the first submission; each row begins with the wait before the attempt."
    if any(each.kind == "idle" for each in report.stretches):
        clock += " Long idle stretches are drawn short."
    body = [_head(report, title), _figures(report)]
    if report.stretches:
        body.append(
            _section(
                "Where the time went",
                "",
                charts.stacked_bar(report.stretches) + _legend(report.parts),
            )
        )
        body.append(
            _section(
                "Attempts on the clock",
                clock,
                charts.time_by_attempt(report.stretches, names),
            )
        )
    hint = "A dashed line is the step from which an attempt went on; red is work that was lost and repeated."
    several = len(report.steps_of_attempt) > 1 or report.lost_steps
    losses = charts.curve(report.steps_of_attempt, lambda line: line.loss, unit="loss")
    if losses:
        body.append(_section("Loss", hint if several else "", losses))
    speed = charts.curve(
        report.steps_of_attempt,
        lambda line: line.tokens_per_second,
        unit="tokens per second, whole job",
        from_zero=True,
    )
    if speed:
        body.append(_section("Speed", "", speed))
    if report.attempts:
        body.append(_section("Attempts", "", _table(report.attempts)))
    if report.notes:
        lines = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
        body.append(_section("What the records do not say", "", f"<ul>{lines}</ul>"))
    body.append(_FOOT)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title.recipe)} {escape(title.run)}: report</title>\n<style>{_STYLE}</style>\n"
        f"</head>\n<body>\n<main>\n{_PATTERN}\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def percent(ratio: float | None) -> str:
    """ "87.3%", "not on record"."""
    return "not on record" if ratio is None else f"{ratio:.1%}"


def _head(report: Report, title: Title) -> str:
    steps = ""
    if report.step is not None:
        steps = f", step {report.step:,}" + (f" of {report.steps:,}" if report.steps is not None else "")
    created = ""
    if title.created is not None:
        created = time.strftime(", created %Y-%m-%d %H:%M", time.localtime(title.created))
    state = (
        "good" if report.state == "done" else "going" if report.state in ("running", "starting") else "bad"
    )
    return (
        f"<header><h1>{escape(title.recipe)} <span>{escape(title.run)}</span></h1>"
        f'<p><b class="{state}">{escape(report.state)}</b>{steps}'
        f" on {escape(title.cluster)}{created}</p></header>"
    )


def _figures(report: Report) -> str:
    failed = f"{report.failures} failure{'s' if report.failures != 1 else ''}"
    mttf = duration(report.mttf_seconds) if report.mttf_seconds is not None else "none failed"
    if report.failures and report.mttf_seconds is None:
        mttf = duration(None)
    lost = "not on record" if report.lost_steps is None else f"{report.lost_steps:,}"
    shown = [
        ("effective training time", percent(report.ettr), "of the time since the first submission"),
        ("without the first queue", percent(report.ettr_without_queue), "of the time since the first start"),
        (
            "training that counts",
            duration(report.productive_seconds),
            f"in {duration(report.wall_seconds or report.wall_without_queue_seconds)}",
        ),
        ("mean time to failure", mttf, f"{failed}, {report.interruptions} interruptions"),
        (
            "steps repeated",
            lost,
            f"over {len(report.attempts)} attempt{'s' if len(report.attempts) != 1 else ''}",
        ),
    ]
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd{' class=none' if value == 'not on record' else ''}>{escape(value)}</dd>"
        f"<dd>{escape(more)}</dd></div>"
        for name, value, more in shown
    )
    return f'<dl class="figures">{cells}</dl>'


def _legend(parts: tuple[Part, ...]) -> str:
    rows = []
    for part in parts:
        if part.seconds == 0 and not part.missing_in:
            continue
        least = "at least " if part.seconds is not None and part.missing_in else ""
        share = f"{part.share:.1%}" if part.share is not None else ""
        rows.append(
            f'<tr><td><svg class="key" viewBox="0 0 12 12"><rect class="{part.kind}" width="12" height="12"/></svg>'
            f"{escape(part.label)}</td><td>{least}{duration(part.seconds)}</td><td>{share}</td></tr>"
        )
    return f'<table class="legend">{"".join(rows)}</table>'


def _table(attempts: tuple[Attempt, ...]) -> str:
    rows = []
    for each in attempts:
        took = (
            duration(each.ended - each.started)
            if each.ended is not None and each.started is not None
            else "?"
        )
        reached = "?" if each.last_step is None else f"{each.last_step:,}"
        begun = "?" if each.resumed_after is None else f"{each.resumed_after:,}"
        steps = f"{begun} → {reached}" if each.last_step is not None else "none"
        lost = "" if not each.lost_steps else f"{each.lost_steps:,}"
        cause = (each.cause or each.state).replace("_", " ")
        kind = "good" if each.cause == "done" else "going" if not each.failed else "bad"
        then = f"<small>{escape(each.action)}</small>" if each.action and each.cause != "done" else ""
        without = f"<small>without {escape(', '.join(each.excluded))}</small>" if each.excluded else ""
        nodes = f"<small>{escape(_few(each.nodes))}</small>" if each.nodes else ""
        ranks = f"{each.world_size:,}" if each.world_size is not None else "?"
        evidence = "<br>".join(escape(line) for line in (*each.evidence[:3], *each.slow))
        rows.append(
            f'<tr><td>{each.number}</td><td><b class="{kind}">{escape(cause)}</b>{then}</td><td>{took}</td>'
            f"<td>{steps}</td><td>{lost}</td><td>{escape(each.job_id or '')}</td>"
            f'<td>{ranks}{nodes}{without}</td><td class="said">{evidence}</td></tr>'
        )
    heads = ("", "ended", "took", "steps", "repeated", "job", "ranks", "evidence")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<table class="attempts"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _few(nodes: tuple[str, ...]) -> str:
    return (
        ", ".join(nodes) if len(nodes) <= 4 else f"{nodes[0]}, {nodes[1]}, … {nodes[-1]} ({len(nodes)} nodes)"
    )


def _section(name: str, hint: str, content: str) -> str:
    said = f"<p>{escape(hint)}</p>" if hint else ""
    return f'<section><h2>{escape(name)}</h2>{said}<div class="wide">{content}</div></section>'


_PATTERN = (
    '<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>'
    '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect class="hatched" width="6" height="6"/><line class="hatching" x1="0" x2="0" y1="0" y2="6"/>'
    "</pattern></defs></svg>"
)

_FOOT = (
    "<footer><p><b>Effective training time</b> is the time in optimizer steps whose result is in the final run, "
    "divided by the time from the first submission to the last record. Repeated steps and waiting for saves do not "
    "count. The ratio is that of arXiv 2410.21680 and arXiv 2509.16293; unlike there, time in which no job was "
    "submitted counts as time too. <b>Mean time to failure</b> is the time that attempts ran, divided by the number "
    "of those that failed; time limits, preemptions, requeues and cancellations are interruptions, not failures.</p>"
    "</footer>"
)

_STYLE = """
:root { --paper:#fff; --ink:#1d2530; --soft:#5d6877; --rule:#e3e7ec; --grid:#edf0f3;
  --train:#2f78b7; --lost:#d4473c; --save:#8b5fc7; --start:#e3a22e; --stop:#a8743c; --preflight:#3fa796;
  --queue:#aab4c0; --idle:#dde2e8; --hatch:#c3cad3; --curve:#1f63a3; --pale:#a8c8e6; --good:#1d8047; --bad:#bd3529 }
@media (prefers-color-scheme: dark) {
  :root { --paper:#14181e; --ink:#e4e8ed; --soft:#98a3b1; --rule:#2b323c; --grid:#222932;
    --train:#4a94d4; --lost:#e5645a; --save:#a583dc; --start:#e0aa47; --stop:#b98a55; --preflight:#4fb8a7;
    --queue:#66717f; --idle:#333b46; --hatch:#4d5763; --curve:#6fb1ea; --pale:#2f5579; --good:#58c486; --bad:#f0827a }
}
* { box-sizing:border-box }
body { margin:0; background:var(--paper); color:var(--ink);
  font:15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
main { max-width:1040px; margin:0 auto; padding:36px 28px 48px }
h1 { font-size:25px; font-weight:650; margin:0; letter-spacing:-.01em }
h1 span { color:var(--soft); font-weight:400 }
h2 { font-size:16px; font-weight:650; margin:0 0 2px }
header p { margin:2px 0 0; color:var(--soft) }
section { margin-top:40px }
section > p { margin:0 0 10px; color:var(--soft); font-size:13.5px }
section > h2 + .wide { margin-top:10px }
.good { color:var(--good) } .bad { color:var(--bad) } .going { color:var(--ink) }
.figures { display:grid; grid-template-columns:repeat(auto-fit,minmax(165px,1fr)); gap:20px 24px; margin:26px 0 0;
  padding:18px 0; border-top:1px solid var(--rule); border-bottom:1px solid var(--rule) }
.figures dt { color:var(--soft); font-size:13px }
.figures dd { margin:0; color:var(--soft); font-size:12.5px; line-height:1.35 }
.figures dt + dd { color:var(--ink); font-size:25px; font-weight:600; letter-spacing:-.015em; line-height:1.4;
  font-variant-numeric:tabular-nums }
.figures div:first-child dt + dd { color:var(--train) }
.figures dt + dd.none { font-size:16px; font-weight:400; color:var(--soft); line-height:2.2 }
.wide { overflow-x:auto }
svg { display:block; width:100%; min-width:640px; height:auto; overflow:visible }
svg.key { display:inline-block; width:11px; min-width:0; height:11px; margin-right:9px; overflow:hidden }
table { border-collapse:collapse; font-variant-numeric:tabular-nums }
.legend { margin-top:12px; font-size:14px }
.legend td { padding:1.5px 30px 1.5px 0 } .legend td + td { text-align:right; padding-right:22px }
.attempts { width:100%; font-size:13.5px }
.attempts th { text-align:left; color:var(--soft); font-weight:500; padding:0 16px 5px 0; white-space:nowrap }
.attempts td { border-top:1px solid var(--rule); padding:6px 16px 6px 0; vertical-align:top; white-space:nowrap }
.attempts td:nth-child(n+3):nth-child(-n+5), .attempts th:nth-child(n+3):nth-child(-n+5) { text-align:right }
.attempts td.said { white-space:normal; min-width:220px; color:var(--soft); overflow-wrap:anywhere }
.attempts b { font-weight:600 }
small { display:block; color:var(--soft); font-size:12px; max-width:260px; white-space:normal }
ul { margin:0; padding-left:19px; color:var(--soft); font-size:14px }
footer { margin-top:44px; border-top:1px solid var(--rule); color:var(--soft); font-size:12.5px }
footer p { max-width:76ch }
.train { fill:var(--train) } .lost { fill:var(--lost) } .save { fill:var(--save) } .start { fill:var(--start) }
.stop { fill:var(--stop) } .preflight { fill:var(--preflight) } .queue { fill:var(--queue) } .idle { fill:var(--idle) }
.unknown { fill:url(#hatch) } .hatched { fill:var(--paper) } .hatching { stroke:var(--hatch); stroke-width:4 }
rect:hover { opacity:.8 }
svg text { font-size:12px } .tick { fill:var(--soft) }
.on { text-anchor:middle; fill:#fff; font-weight:600 } .on-idle, .on-unknown, .on-queue { fill:var(--ink) }
.on-start { fill:#1d2530 }
.grid { stroke:var(--grid) } .axis { stroke:var(--queue) }
.attempt { stroke:var(--soft); stroke-dasharray:4 4; opacity:.55 }
.cut { stroke:var(--paper); stroke-width:2.5; fill:none }
polyline { fill:none; stroke-linejoin:round; stroke-linecap:round }
.line { stroke:var(--curve); stroke-width:2 } .raw { stroke:var(--pale); stroke-width:1.2 }
.halo { stroke:var(--lost); stroke-width:7; opacity:.45 } .band { fill:var(--lost); opacity:.13 }
.dot { fill:var(--curve) }
.last { fill:var(--curve); font-weight:600 }
@media (max-width:600px) { main { padding:22px 16px } }
@media print { .wide { overflow:visible } section { break-inside:avoid } }
"""
