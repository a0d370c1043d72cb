"""How a figure is drawn: marks on matplotlib axes, one style, inline SVG in the colours of the page's CSS variables.

Takes arrays and labels. Knows nothing of runs, metrics or what a figure is to show."""

import io
import re

import numpy as np

from rlhf_jax.evaluation import is_number

# Role -> (stand-in colour inside matplotlib, colour of the PNG). The page's CSS has the variable --ROLE.
ROLES = {
    "text": ("#010101", "#1f2733"),
    "muted": ("#020202", "#677083"),
    "grid": ("#030303", "#e3e7ee"),
    "before": ("#040404", "#8b94a5"),
    "after": ("#050505", "#0b8f6f"),
    "reward": ("#060606", "#2f62d9"),
    "gold": ("#070707", "#b97a0b"),
    "kl": ("#080808", "#7d45d6"),
    "other": ("#090909", "#4a5a73"),
    "limit": ("#0a0a0a", "#cf3f4a"),
}
MAX_POINTS = 300  # of a curve or cloud; more only makes the page larger
WIDTH, HEIGHT = 3.5, 2.25  # inches
KL_AXIS = "KL from the starting model (nats a completion, square-root scale)"


def has_numbers(row, count):
    """True for a JSON list that begins with `count` numbers."""
    return isinstance(row, list) and len(row) >= count and all(map(is_number, row[:count]))


def blocks(values, count=MAX_POINTS):
    """Means of `count` equal blocks in order; the values themselves if there are fewer."""
    return np.array([block.mean() for block in np.array_split(values, min(count, len(values)))])


def smooth(values):
    """Centred running mean over a tenth of the curve, narrower at the ends."""
    half = len(values) // 20
    padded = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (padded[high] - padded[low]) / (high - low)


def curve(ax, colours, steps, values, role, label=None):
    """The values pale and their running mean bold; few values as dots."""
    steps, values = blocks(steps), blocks(values)
    if len(values) < 20:
        ax.plot(steps, values, color=colours[role], linewidth=1.6, marker="o", markersize=3, label=label)
        return
    ax.plot(steps, values, color=colours[role], linewidth=0.8, alpha=0.35)
    ax.plot(steps, smooth(values), color=colours[role], linewidth=1.9, label=label)


def legend(ax, colours):
    if ax.get_legend_handles_labels()[1]:
        ax.legend(frameon=False, labelcolor=colours["muted"], handlelength=1.6, borderaxespad=0.2)


def histogram(ax, colours, groups, labels, roles, unit):
    together = np.concatenate(groups)
    low, high = together.min(), together.max()
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, min(30, max(8, len(together) // 8)) + 1)
    if high - low < 60 and high - low >= 4 and np.all(together == np.round(together)):
        edges = np.arange(low, high + 2) - 0.5  # counts: one bar each
    for values, label, role in zip(groups, labels, roles, strict=True):
        share = np.histogram(values, edges)[0] / len(values)
        ax.stairs(share, edges, fill=True, color=colours[role], alpha=0.28)
        ax.stairs(share, edges, color=colours[role], linewidth=1.4, label=label)
        ax.axvline(values.mean(), color=colours[role], linestyle="--", linewidth=1.2)
    ax.set(xlabel=f"{unit} (dashed: mean)", ylabel="share of completions")
    ax.margins(y=0.2)
    legend(ax, colours)


def calibration(ax, colours, rows):
    x, y = np.array([row[:2] for row in rows], float).T
    counts = np.array([row[2] if has_numbers(row, 3) else 1.0 for row in rows], float)
    ax.plot([0, 1], [0, 1], color=colours["muted"], linestyle=":", linewidth=1.0)
    ax.plot(x, y, color=colours["reward"], linewidth=0.9, alpha=0.5)
    ax.scatter(
        x, y, s=10 + 70 * counts / max(counts.max(), 1e-9), color=colours["reward"], alpha=0.8, linewidths=0
    )
    ax.set(xlabel="predicted probability", ylabel="observed share", xlim=(0, 1), ylim=(0, 1))


def cloud(ax, colours, points):
    points = points[:: -(-len(points) // MAX_POINTS)]
    ax.scatter(points[:, 1], points[:, 0], s=9, color=colours["gold"], alpha=0.5, linewidths=0)
    ax.set(xlabel="true reward (gold units)", ylabel="learned reward (reward units)")


def root_scale(axes, furthest):
    """x from 0 to a little beyond `furthest`, spaced by the square root, with round ticks."""
    for ax in axes:
        ax.set_xscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0.0)), np.square))
        ax.set_xlim(0.0, furthest * 1.08)
        nice = [0, 0.02, 0.1, 0.25, 0.5, 1, 2, 4, 6, 9, 12, 16, 25, 36, 50, 75, 100, 200, 400, 1000]
        ticks = [tick for tick in nice if tick <= furthest * 1.08]
        while len(ticks) > 9:
            ticks = [0, *ticks[1::2]] if len(ticks) % 2 == 0 else ticks[::2]
        far = [tick for tick in ticks if tick == 0 or np.sqrt(tick) > 0.06 * np.sqrt(furthest)]
        ax.set_xticks(far, labels=[f"{tick:g}" for tick in far])


def plain(text):
    """matplotlib reads a dollar sign as the beginning of a formula."""
    return str(text).replace("$", r"\$")


def style(colours, size=8.5):
    muted = colours["muted"]
    return {
        "font.family": "DejaVu Sans", "font.size": size, "legend.fontsize": size - 1,
        "text.color": colours["text"], "axes.titlecolor": colours["text"],
        "axes.labelsize": size - 0.5, "axes.labelcolor": muted, "axes.edgecolor": colours["grid"],
        "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "axes.axisbelow": True, "grid.color": colours["grid"], "grid.linewidth": 0.7,
        "xtick.color": muted, "xtick.labelsize": size - 1, "xtick.major.size": 0,
        "ytick.color": muted, "ytick.labelsize": size - 1, "ytick.major.size": 0,
        "svg.fonttype": "none", "path.simplify": True, "path.simplify_threshold": 0.2,
    }  # fmt: skip


def svg(draw, name, rows=1, width=WIDTH, height=HEIGHT):
    """Draws into `rows` axes that share x and gives inline SVG in the page's colours."""
    import matplotlib  # here, because it takes half a second
    from matplotlib.figure import Figure as MatplotlibFigure

    colours = {role: pair[0] for role, pair in ROLES.items()}
    buffer = io.StringIO()
    # Ids are hashes with this salt: figures of one page must not share them.
    with matplotlib.rc_context({**style(colours), "svg.hashsalt": name}):
        figure = MatplotlibFigure(figsize=(width, height * rows), layout="constrained")
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        draw(axes if rows > 1 or width != WIDTH else axes[0], colours)
        figure.align_ylabels(axes)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue())


def _inline(svg):
    """matplotlib's SVG file as markup for inside a page: no header, links, style sheet or idle ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| (?:width|height)="[\d.]+pt"', "", svg)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    for role, (stand_in, _) in ROLES.items():
        svg = svg.replace(stand_in, f"var(--{role})")
    return re.sub(r"\s*\n\s*", "\n", svg).strip()
