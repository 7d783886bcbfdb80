"""The table of `benchmarks.startup`, made from its rows."""

from __future__ import annotations

from statistics import median

from benchmarks.table import Row, line, origin

AFTER = {"torch and transformers": "after torch and transformers", "and models": "after a model's class as well"}


def startup_markdown(rows: list[Row]) -> str:
    """What the hook adds to a start of python, and what an import of the package takes."""
    last = max((str(row["run"]) for row in rows), default="")
    rows = [row for row in rows if row["run"] == last]
    starts = {row["hook"]: row for row in rows if row["part"] == "startup-hook"}
    imports = [row for row in rows if row["part"] == "startup-import"]
    if not rows:
        return ""
    hardware = rows[0]["hardware"]
    caption = f"Medians, in milliseconds, on {hardware['cores']} cores of {hardware['cpu']}; {origin(rows)}."
    lines = [caption, "", line("", "of the processor", "on the clock", "times"), line("---", "---:", "---:", "---:")]
    if len(starts) == 2:
        lines.append(line("the hook's line alone", "", f"{starts[True]['line_ms']:.3f}", ""))
    for hook in (False, True) if len(starts) == 2 else ():
        name = f"a start of python, {'with' if hook else 'without'} the hook"
        lines.append(_cells(name, starts[hook], "start"))
    for row in imports:
        name = f"`import hf_accel_patch`, {AFTER[row['after']]}"
        lines.append(_cells(name + (", `HF_ACCEL_PATCH=1`" if row["patching"] else ""), row, "import"))
    return "\n".join(lines)


def _cells(name: str, row: Row, kind: str) -> str:
    cpu_ms, clock_ms = row[f"{kind}_cpu_ms"], row[f"{kind}_ms"]
    return line(name, f"{median(cpu_ms):.1f}", f"{median(clock_ms):.1f}", f"{len(cpu_ms)}")
