"""The table of plans in docs/plan.md: PPO with LoRA of Llama-2 on TPU slices, every program of the stage compiled.

python -m benchmarks.plan_table            compiles what docs/plan.json does not have, one slice after the other
python -m benchmarks.plan_table --again    compiles all of it again;  --only=7b v5e  those whose line has these words
Needs the compiler (pip install 'rlhf_jax[plan]') and 2 to 5 minutes of one core a slice."""

import argparse
import json
import pathlib
import subprocess
import sys

DOCS = pathlib.Path(__file__).parent.parent / "docs"
KEPT, PAGE = DOCS / "plan.json", DOCS / "plan.md"
MARKS = ("<!-- table: begin -->", "<!-- table: end -->")
GIB = 2.0**30

# Each size on the smallest slice of each chip that is thought to hold it, and on one with room.
PAIRS = (
    ("llama2_7b", "v5e:4x4"),
    ("llama2_70b", "v5p:2x2x2"),
    ("llama2_7b", "v5e:2x2"),
    ("llama2_70b", "v5p:2x2x1"),
    ("llama2_13b", "v5e:2x4"),
    ("llama2_70b", "v6e:4x4"),
    ("llama2_7b", "v4:2x2x1"),
    ("llama2_7b", "v6e:2x2"),
    ("llama2_7b", "v5p:2x2x1"),
    ("llama2_13b", "v4:2x2x1"),
    ("llama2_13b", "v6e:2x2"),
    ("llama2_13b", "v5p:2x2x1"),
    ("llama2_70b", "v4:2x2x4"),
    ("llama2_70b", "v5e:8x8"),
)


# Where the config's mesh does not fit so few devices.
OVERRIDES = {"llama2_70b v5p:2x2x1": ("--config.mesh.tensor=4",)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only", nargs="*", default=[])
    flags = parser.parse_args()
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for size, topology in PAIRS:
        name = f"{size} {topology}"
        wanted = all(word in name for word in flags.only)
        if wanted and (flags.again or name not in kept):
            print(name, flush=True)
            kept[name] = plan(size, topology)
            KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    write(kept)


def plan(size: str, topology: str) -> dict:
    command = [
        sys.executable,
        "-m",
        "experiments.plan",
        f"--config=configs/ppo.py:{size}",
        f"--topology={topology}",
        *OVERRIDES.get(f"{size} {topology}", ()),
    ]
    made = subprocess.run([*command, "--stages=ppo", "--json"], check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(made.stdout)
    (stage,) = found["stages"]
    names = ("chips", "hbm_bytes", "mesh", "fits", "headroom_bytes", "change")
    of_stage = ("resident_bytes", "step_bound_seconds", "step_expected_seconds", "expected_tokens_per_second",
                "expected_chip_hours")  # fmt: skip
    of_phase = ("name", "fits", "bytes", "compile_cpu_seconds", "compiler", "bound_seconds", "binds")
    phases = [{name: phase[name] for name in of_phase if name in phase} for phase in stage["phases"]]
    return {n: found[n] for n in names} | {n: stage[n] for n in of_stage} | {"phases": phases}


def write(kept: dict) -> None:
    head, _, rest = PAGE.read_text().partition(MARKS[0])
    tail = rest.partition(MARKS[1])[2]
    PAGE.write_text(f"{head}{MARKS[0]}\n{table(kept)}\n{MARKS[1]}{tail}")


def table(kept: dict) -> str:
    """Markdown: what each slice needs and takes, then memory and compile time of each program."""
    order = [name for name in (f"{size} {topology}" for size, topology in PAIRS) if name in kept]
    order.sort(
        key=lambda name: (int(name[7 : name.index("b ")]), name.split()[1].split(":")[0], kept[name]["chips"])
    )
    head = ("model", "slice", "mesh", "fits, GiB a chip", "step, bound", "completion tokens/s, expected",
            "chip-hours, 1000 steps")  # fmt: skip
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in order:
        one, (size, topology) = kept[name], name.split()
        most = one["hbm_bytes"] - one["headroom_bytes"]
        fits = f"{'yes' if one['fits'] else '**no**'}, {most / GIB:.1f} of {one['hbm_bytes'] / GIB:.1f}"
        mesh = " x ".join(f"{axis} {n}" for axis, n in one["mesh"].items() if n > 1)
        if one["fits"]:
            last = (f"{one['step_bound_seconds']:.2g} s", f"{one['expected_tokens_per_second']:,.0f}",
                    f"{one['expected_chip_hours']:.3g}")  # fmt: skip
        else:
            change = one["change"]
            last = (f"fits with `{change['flags']}`" if change else "no change tried fits", "", "")
        rows.append(f"| {size} | {topology}, {one['chips']} chips | {mesh} | {fits} | {' | '.join(last)} |")
    rows += ["", "GiB a chip while each program runs, and CPU seconds to compile it:", ""]
    names = list(dict.fromkeys(phase["name"] for name in order for phase in kept[name]["phases"]))
    rows += [f"| model | slice | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for name in order:
        phases = {phase["name"]: phase for phase in kept[name]["phases"]}
        told = lambda one: f"{one['bytes'] / GIB:.2f}, {one['compile_cpu_seconds']:.0f} s"
        cells = [told(phases[n]) if n in phases else "" for n in names]
        rows.append(f"| {' | '.join([*name.split(), *cells])} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
