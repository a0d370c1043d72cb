"""A plan on a terminal: tables, the verdict, what it assumes. Knows the dict that planner.plan gives."""

import contextlib
import os
import sys

from rich import box
from rich.console import Console
from rich.table import Table

GIB = 2.0**30
COLUMNS = ("phase", "calls", "GiB a chip", "of it arg/temp/beside", "TFLOP", "HBM GB", "received GB", "bound", "binds",
           "tokens/s", "compiled")  # fmt: skip
SHORT = {"all-gather": "gather", "all-reduce": "reduce", "reduce-scatter": "scatter", "all-to-all": "to all",
         "collective-permute": "permute"}  # fmt: skip


def progress():
    """tell(text): one line on standard error that is written over; without a terminal, a line each."""
    over = sys.stderr.isatty()

    def tell(text: str) -> None:
        if over:
            print(f"\r\033[K{text[:110]}", end="", file=sys.stderr, flush=True)
        elif text:
            print(text, file=sys.stderr, flush=True)

    return tell


@contextlib.contextmanager
def quiet():
    """What the compiler's native code prints goes to standard error: standard output is the plan's alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def show(found: dict) -> None:
    plain = {} if sys.stdout.isatty() else {"width": 160, "color_system": None}
    out = Console(markup=False, highlight=False, **plain)
    style = box.SIMPLE_HEAD if sys.stdout.isatty() else box.ASCII2
    mesh = ", ".join(f"{name} {size}" for name, size in found["mesh"].items())
    out.print(
        f"{found['config']} on {found['topology']}: {found['chips']} chips of {found['hbm_bytes'] / GIB:.2f} GiB, "
        f"mesh {mesh}")  # fmt: skip
    for stage in found["stages"]:
        _stage(out, style, stage, found)
    _verdict(out, found)
    if "search" in found:
        _search(out, style, found["search"])
    out.print("\nassumptions", style="bold")
    for line in found["assumptions"]:
        out.print(f"- {line}")


def _stage(out, style, stage, found) -> None:
    title = f"{stage['name']}, {stage['steps']} steps; {stage['resident_bytes'] / GIB:.2f} GiB a chip stay throughout"
    table = Table(title=title, box=style, title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("phase", "received GB", "binds") else "right")
    for phase in stage["phases"]:
        _rows(table, phase)
    if stage["phases"]:
        out.print(table)
    for line in stage["unplanned"]:
        out.print(f"  not planned in {stage['name']}: {line}")
    if stage["step_bound_seconds"]:
        bound, expected = (seconds(stage[f"step_{name}_seconds"]) for name in ("bound", "expected"))
        rate = stage["expected_tokens_per_second"]
        rate = f" ({rate:,.0f} completion tokens/s)" if stage["tokens_per_step"] else ""
        line = (
            f"  a step: bound {bound}, expected {expected}{rate}; all {stage['steps']} steps: {hours(stage)}"
        )
        out.print(line)


def _rows(table, phase) -> None:
    size = f"{phase['bytes'] / GIB:.2f}" + ("" if phase["fits"] else " !")
    if "compiler" in phase:
        table.add_row(
            phase["name"], f"{phase['calls']:g}", size, "", "", "", phase["compiler"], "", "", "", ""
        )
        return
    parts = [phase[f"{name}_bytes"] / GIB for name in ("arguments", "temporaries", "beside")]
    rate = phase.get("expected_tokens_per_second")
    table.add_row(phase["name"], f"{phase['calls']:g}", size, "/".join(f"{x:.2f}" for x in parts), *_work(phase),
                  f"{rate:,.0f}" if rate else "", f"{phase['compile_seconds']:.0f} s")  # fmt: skip
    for name, part in phase.get("parts", {}).items():
        table.add_row(f"  {name}", "", "", "", *_work(part), "", "")


def _work(part) -> tuple[str, ...]:
    sent = [(SHORT.get(kind, kind), total["bytes"] / 1e9) for kind, total in part["collectives"].items()]
    received = ", ".join(f"{kind} {amount:.3g}" for kind, amount in sent if amount > 1e-3)
    work = (f"{part['flops'] / 1e12:.3g}", f"{part['hbm_bytes'] / 1e9:.3g}", received)
    return *work, seconds(part["bound_seconds"]), part["binds"]


def _verdict(out, found) -> None:
    if found["largest"] is None:
        out.print("\nnothing of this config could be planned")
        return
    where, room = f"{found['largest']['stage']}: {found['largest']['phase']}", found["headroom_bytes"] / GIB
    if found["fits"]:
        out.print(f"\nfits, with {room:.2f} GiB a chip to spare ({where} needs most)", style="bold")
        out.print(
            f"expected, all stages: {found['expected_hours']:.2g} hours, {found['expected_chip_hours']:.3g} chip-hours",
            highlight=False,
        )
        return
    out.print(f"\ndoes not fit: {where} needs {-room:.2f} GiB a chip too much", style="bold")
    change = found["change"]
    if change:
        out.print(f"smallest change found that fits (compiled: {change['bytes'] / GIB:.2f} GiB): {change['flags']}",
                  highlight=False)  # fmt: skip
    else:
        out.print("no change that was tried fits: more chips, or a smaller model")


def _search(out, style, search) -> None:
    table = Table(title=f"search, stage {search['stage']}", box=style, title_justify="left")
    for name in ("change", "fits", "GiB a chip", "step, bound", "completions/s, bound"):
        table.add_column(name)
    for one in search["ranked"]:
        changes = " ".join(f"{key}={value}" for key, value in one["changes"].items())
        rate = one["completions_per_second"]
        table.add_row(changes, "yes" if one["fits"] else "no", f"{one['bytes'] / GIB:.2f}",
                      seconds(one["step_bound_seconds"]) if rate else "", f"{rate:.3g}" if rate else "")  # fmt: skip
    out.print(table)


def seconds(value) -> str:
    return (
        f"{value:.3g} s"
        if value >= 1
        else f"{value * 1e3:.3g} ms"
        if value >= 1e-3
        else f"{value * 1e6:.3g} us"
    )


def hours(stage) -> str:
    return f"{stage['expected_hours']:.2g} hours, {stage['expected_chip_hours']:.3g} chip-hours expected"
