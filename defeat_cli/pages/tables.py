"""The tables of a run's pages, made of what results.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from defeat_cli.console import percent
from defeat_cli.tables import Sheet


def who_is_in(results: Mapping[str, Any]) -> dict[str, str]:
    """Names in results.json of those that were scored, each with what it is called."""
    called = {"teacher": "teacher", "plain": "plain", "student": "distilled"}
    found = [who for who in called if results.get(who)]
    return {who: called[who] if "teacher" in found or who != "student" else "student" for who in found}


def class_sheet(results: Mapping[str, Any]) -> Sheet:
    """AP of each class, a column each, and what the student gained over the plain one, else has over the teacher."""
    found = who_is_in(results)
    other = next((who for who in ("plain", "teacher") if who in found), None)
    rows = []
    for name, ap in results["student"]["per_class"].items():
        aps = {who: results[who].get("per_class", {}).get(name, -1.0) for who in found}
        row = [name, *map(percent, aps.values())]
        if other is not None:
            both = ap >= 0 and aps[other] >= 0
            row.append(f"{100 * (ap - aps[other]):+.1f}" if both else "-")
        rows.append(row)
    return Sheet("AP of each class", ["class", *found.values(), *([f"Δ {found[other]}"] if other else [])], rows)


def error_sheet(results: Mapping[str, Any]) -> Sheet | None:
    """The AP50 that each type of error costs, and how many there are of it; None where no one's are known."""
    known = {who: name for who, name in who_is_in(results).items() if results[who].get("errors")}
    if not known:
        return None
    rows = []
    for kind in results[next(iter(known))]["errors"]["types"]:
        found = [results[who]["errors"]["types"][kind] for who in known]
        cells = [part for one in found for part in (percent(max(0.0, one["dap"])), f"{one['count']:,}")]
        rows.append([kind, *cells])
    header = [part for name in known.values() for part in (name, "count")]
    return Sheet("AP50 that each type of error costs (TIDE), and how many there are", ["error", *header], rows)


def verdict(results: Mapping[str, Any]) -> str:
    """The outcome in one sentence."""
    found, taken = who_is_in(results), results.get("ms_per_image", {})
    ap = results["student"]["AP"]
    parts = [f"The {'distilled student' if 'teacher' in found else 'detector'} has AP {percent(ap)}"]
    if "plain" in found:
        parts.append(f"{100 * (ap - results['plain']['AP']):+.1f} against the same student without a teacher")
    if "teacher" in found:
        parts.append(f"{100 * (ap - results['teacher']['AP']):+.1f} against its teacher")
    if {"teacher", "student"} <= taken.keys() and taken["teacher"] > 0:
        parts.append(f"and takes {100 * taken['student'] / taken['teacher']:.0f}% of the teacher's time for an image")
    return ", ".join(parts) + "."
