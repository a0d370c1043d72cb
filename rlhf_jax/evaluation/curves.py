"""Figures of a run: curves over steps, reward against KL, distributions, reward-model quality.

Each function takes a Run and gives figures as inline SVG, coloured by the page's CSS variables so that they
follow light and dark; or None where the data is absent. Only numbers and stage names reach a figure, never a
model's text. Knows nothing of HTML pages and of what is good or bad."""

import dataclasses
import os

import numpy as np

from rlhf_jax.evaluation import Run, as_list, drawing, is_number, load_run, to_array

# Metric -> (title, unit on the axis, role, what to look for). The order is that of the page.
# fmt: off
CURVES = {
    "reward": ("Reward", "reward units", "reward",
               "Trained on. Should rise, then level off; flat from the first step means that nothing is "
               "learned."),
    "gold_reward": ("True reward", "gold units", "gold",
                    "Never trained on. If it turns down while the learned one rises, the reward model is "
                    "exploited."),
    "kl": ("Distance from the start (KL)", "nats a completion", "kl",
           "Grows, then should level off; above about 10 nats a completion text usually suffers."),
    "entropy": ("Entropy", "nats a token", "other",
                "How much choice the policy keeps. Falls slowly; a plunge towards 0 means set phrases."),
    "accuracy": ("Judgements agreed with", "share of pairs, or of labels", "reward",
                 "Should rise from a coin's 0.5 to the ceiling that noisy labels set. Above it, noise is "
                 "memorised."),
    "margin": ("Margin", "reward units", "reward",
               "Chosen minus rejected. If it grows on while accuracy does not, the model is only surer of "
               "itself."),
    "loss": ("Loss", "loss", "other", "Should settle. A sudden jump or a steady climb is worth a look."),
    "explained_variance": ("Critic: explained variance", "share, 1 is perfect", "other",
                           "How well the critic predicts returns. Should rise above 0 towards 1."),
    "clip_fraction": ("Clipped tokens", "share of tokens", "other",
                      "Where PPO's clip holds a step back. A few per cent is normal; above 0.3, steps are "
                      "too large."),
    "completion_length": ("Completion length", "tokens", "other",
                          "Should stay steady. Drift is the commonest way of gaming a reward."),
    "finished_fraction": ("Finished", "share of completions", "other", "Completions that ended."),
    "kl_coeff": ("KL coefficient", "reward units a nat", "kl", "The price of distance, as its controller moves it."),
}
DISTRIBUTIONS = {
    "reward": ("Reward, before and after", "reward units",
               "The whole hill should move right. A spike at the right edge is one trick that always pays."),
    "gold_reward": ("True reward, before and after", "gold units",
                    "What was really wanted. It should move the same way as the learned reward."),
    "completion_length": ("Length, before and after", "tokens", "Should overlap, unless length is wanted."),
}
# fmt: on


@dataclasses.dataclass(frozen=True)
class Figure:
    """title and caption are plain text; svg is markup of our own making."""

    title: str
    caption: str
    svg: str


def stage_curves(run, stage):
    """One figure for each metric of CURVES that the stage logged at two steps or more."""
    figures = []
    for name, (title, unit, role, caption) in CURVES.items():
        steps, values = run.series(stage, name)
        held_out = run.series(stage, f"eval/{name}")
        if len(steps) < 2 or (name == "kl_coeff" and np.ptp(values) == 0):
            continue

        def draw(ax, colours, name=name, role=role, unit=unit, series=(steps, values), held_out=held_out):
            drawing.curve(ax, colours, *series, role, label="training batches" if len(held_out[0]) else None)
            _held_out(ax, colours, held_out)
            _reference_lines(ax, colours, run, stage, name, values=series[1])
            ax.set(xlabel="step", ylabel=unit)
            drawing.legend(ax, colours)

        figures.append(Figure(title, caption, drawing.svg(draw, f"{stage}-{name}")))
    return figures


def reward_against_kl(run, stage):
    """The over-optimisation plot of Gao et al. 2022 (arXiv:2210.10760): both rewards against KL."""
    if not _enough_against_kl(run, stage):
        return None
    count = len(_against_kl_rows(run, stage))
    draw = lambda axes, colours: _draw_against_kl(axes, colours, run, stage)
    caption = (
        "Each dot is a stretch of training, pale early and full late; diamonds are the held-out prompts. "
        "Going right costs distance from the starting model, going up is what it buys. "
    )
    caption += (
        "Healthy: both curves rise. Over-optimised: the learned reward still rises while the true reward has "
        "turned down; the best checkpoint is at its top. "
        if count == 2
        else "No true reward was measured, so over-optimisation cannot be seen here. "
    )
    caption += "The axis is spaced by the square root of KL, as in Gao et al. 2022 (arXiv:2210.10760)."
    title = "What distance buys: reward against KL"
    return Figure(title, caption, drawing.svg(draw, f"{stage}-against-kl", rows=count, width=6.0, height=2.0))


def distributions(run):
    """Histograms of the held-out prompts' scores, before and after."""
    figures = []
    for name, (title, unit, caption) in DISTRIBUTIONS.items():
        before, after = (
            values[np.isfinite(values)] for values in (run.evaluated(s, name) for s in ("untuned", "tuned"))
        )
        if len(before) > 1 and len(after) > 1:
            draw = lambda ax, colours, pair=(before, after), unit=unit: drawing.histogram(
                ax, colours, pair, ("before tuning", "after tuning"), ("before", "after"), unit
            )
            figures.append(Figure(title, caption, drawing.svg(draw, f"distribution-{name}")))
    kl = run.evaluated("tuned", "kl")
    kl = kl[np.isfinite(kl)]
    if len(kl) > 1:
        draw = lambda ax, colours: drawing.histogram(
            ax, colours, (kl,), (None,), ("kl",), "nats a completion"
        )
        caption = (
            "How much likelier each tuned completion is under the tuned than under the starting model, as a "
            "log; its mean is the KL. Single values may be negative. A long right tail: some prompts are "
            "pushed much further."
        )
        figures.append(Figure("KL by completion", caption, drawing.svg(draw, "distribution-kl")))
    return figures


def reward_model_quality(run):
    """Calibration, held-out scores and score against gold, from reward_model.json."""
    data, figures = run.reward_model, []
    calibration = [row for row in as_list(data.get("calibration")) if drawing.has_numbers(row, 2)]
    if len(calibration) > 1:
        caption = (
            "Where the model says 80%, the labels should agree 80% of the time: dots on the diagonal. "
            "Flatter than the diagonal: too sure of itself. Larger dots stand for more pairs."
        )
        draw = lambda ax, colours: drawing.calibration(ax, colours, calibration)
        figures.append(Figure("Calibration", caption, drawing.svg(draw, "calibration")))
    chosen, rejected = (
        values[np.isfinite(values)] for values in map(to_array, (data.get("chosen"), data.get("rejected")))
    )
    if len(chosen) > 1 and len(rejected) > 1:
        draw = lambda ax, colours: drawing.histogram(
            ax, colours, (rejected, chosen), ("rejected", "chosen"), ("before", "after"), "reward units"
        )
        caption = (
            "Scores of held-out pairs. Chosen should lie right; the hills overlap as the labels are noisy."
        )
        figures.append(Figure("Held-out scores", caption, drawing.svg(draw, "held-out-scores")))
    points = np.array([row[:2] for row in as_list(data.get("gold")) if drawing.has_numbers(row, 2)], float)
    if len(points) > 2:
        rank = spearman(points[:, 0], points[:, 1])
        draw = lambda ax, colours: drawing.cloud(ax, colours, points)
        caption = (
            f"Each dot is a held-out completion (rank correlation {rank:.2f}). A rising cloud means that the "
            "learned reward knows what is wanted; top left corners are what a policy will exploit."
        )
        figures.append(
            Figure("Learned against true reward", caption, drawing.svg(draw, "score-against-gold"))
        )
    return figures


def save_summary_png(workdir):
    """Writes workdir/summary.png, up to four panels for a README, from what is there.
    Returns: its path, or None if the workdir has nothing to draw."""
    run = workdir if isinstance(workdir, Run) else load_run(workdir)
    panels = _summary_panels(run)
    if not panels:
        return None
    import matplotlib
    from matplotlib.figure import Figure as MatplotlibFigure

    colours = {role: pair[1] for role, pair in drawing.ROLES.items()}
    path = os.path.join(run.workdir, "summary.png")
    with matplotlib.rc_context(drawing.style(colours, size=9.0)):
        columns = min(2, len(panels))
        rows = -(-len(panels) // columns)
        figure = MatplotlibFigure(
            figsize=(4.9 * columns, 3.3 * rows), layout="constrained", facecolor="white"
        )
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        for subfigure, (title, count, draw) in zip(
            np.ravel(figure.subfigures(rows, columns)), panels, strict=False
        ):
            axes = subfigure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
            axes[0].set_title(title, loc="left", fontweight="bold", fontsize=10)
            draw(axes if count > 1 else axes[0], colours)
            subfigure.align_ylabels(axes)
        figure.savefig(path + ".new", format="png", dpi=130)
    os.replace(path + ".new", path)
    return path


def _summary_panels(run):
    panels, stages = [], run.rl_stages()
    if stages:
        stage = stages[-1]
        names = [name for name in ("reward", "gold_reward", "kl") if len(run.series(stage, name)[0]) > 1]

        def over_steps(axes, colours):
            for ax, name in zip(np.atleast_1d(axes), names, strict=True):
                drawing.curve(ax, colours, *run.series(stage, name), CURVES[name][2])
                short = "KL\n(nats)" if name == "kl" else _reward_label(run, stage, name).replace(" ", "\n")
                ax.set_ylabel(short, color=colours[CURVES[name][2]], fontsize=8)
            np.atleast_1d(axes)[-1].set_xlabel(f"{drawing.plain(stage)} step")

        if names:
            title = f"Training on the {_reward_label(run, stage, 'reward')}"
            panels.append((title, len(names), over_steps))
    gold_name = "gold_reward" if len(run.paired("gold_reward")[0]) > 1 else "reward"
    pair = run.paired(gold_name)
    if len(pair[0]) > 1 and len(pair[1]) > 1:
        unit = (
            drawing.plain(run.evaluation.get("gold_name") or "true reward")
            if gold_name == "gold_reward"
            else "reward units"
        )
        labels = tuple(
            f"{name}, mean {v.mean():+.2f}" for name, v in zip(("before", "after"), pair, strict=True)
        )
        draw = lambda ax, colours: drawing.histogram(ax, colours, pair, labels, ("before", "after"), unit)
        panels.append(("Held-out prompts, before and after", 1, draw))
    steps, accuracy = run.series("reward_model", "accuracy")
    if len(steps) > 1:

        def learned(ax, colours):
            drawing.curve(ax, colours, steps, accuracy, "reward", label="training batches")
            _held_out(ax, colours, run.series("reward_model", "eval/accuracy"))
            _reference_lines(ax, colours, run, "reward_model", "accuracy", accuracy)
            ax.set(xlabel="reward model step", ylabel="share of pairs ranked right")
            drawing.legend(ax, colours)

        panels.append(("Reward model", 1, learned))
    if stages and _enough_against_kl(run, stages[-1]):
        count = len(_against_kl_rows(run, stages[-1]))
        draw = lambda axes, colours: _draw_against_kl(np.atleast_1d(axes), colours, run, stages[-1])
        panels.append(("What distance from the start buys", count, draw))
    return panels


def spearman(x, y):
    """Rank correlation; ties share their mean rank."""
    ranks = []
    for values in (x, y):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2.0)[inverse])
    return float(np.corrcoef(*ranks)[0, 1]) if min(map(np.ptp, ranks)) > 0 else 0.0


def _held_out(ax, colours, series):
    if len(series[0]):
        ax.plot(*series, color=colours["gold"], linewidth=1.4, marker="o", markersize=3, label="held-out")


def _reference_lines(ax, colours, run, stage, name, values):
    if name == "accuracy" and stage == "reward_model":
        ceiling, held_out = run.reward_model.get("ceiling"), run.reward_model.get("accuracy")
        if is_number(ceiling):
            ax.axhline(
                ceiling, color=colours["limit"], linestyle="--", linewidth=1.2, label=f"ceiling {ceiling:.2f}"
            )
        if is_number(held_out) and not len(run.series(stage, "eval/accuracy")[0]):
            ax.axhline(held_out, color=colours["gold"], linewidth=1.4, label=f"held-out {held_out:.2f}")
    if name == "accuracy":
        ax.axhline(0.5, color=colours["muted"], linestyle=":", linewidth=1.0, label="a coin")
    if name == "kl" and values.max() > 6:
        ax.axhline(10, color=colours["limit"], linestyle="--", linewidth=1.0, label="10 nats")
    if name in ("gold_reward", "explained_variance") and values.min() < 0 < values.max():
        ax.axhline(0, color=colours["muted"], linestyle=":", linewidth=1.0)


def _reward_label(run, stage, name):
    """Without a true reward beside it, the reward trained on is the only one, and may be a rule."""
    if name == "gold_reward":
        return "true reward"
    return "learned reward" if len(run.series(stage, "gold_reward")[0]) else "reward"


def _against_kl_rows(run, stage):
    return [name for name in ("reward", "gold_reward") if len(run.series(stage, name)[0]) > 3]


def _enough_against_kl(run, stage):
    kl = run.series(stage, "kl")[1]
    return bool(_against_kl_rows(run, stage)) and len(kl) > 3 and kl.max() > 0.02


def _draw_against_kl(axes, colours, run, stage):
    kl_steps, kl = run.series(stage, "kl")
    names = _against_kl_rows(run, stage)
    furthest = 0.0
    for ax, name in zip(axes, names, strict=True):
        steps, values = run.series(stage, name)
        common, of_kl, of_values = np.intersect1d(kl_steps, steps, return_indices=True)
        count = min(40, len(common))
        x, y = np.maximum(drawing.blocks(kl[of_kl], count), 0.0), drawing.blocks(values[of_values], count)
        colour = colours[CURVES[name][2]]
        ax.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
        ax.scatter(x, y, s=16, color=colour, alpha=np.linspace(0.2, 1.0, len(x)), linewidths=0)
        ends = [run.evaluated(side, name) for side in ("untuned", "tuned")]
        tuned_kl = run.evaluated("tuned", "kl")
        if all(np.isfinite(values).any() for values in (*ends, tuned_kl)):
            x_ends = [0.0, max(np.nanmean(tuned_kl), 0.0)]
            y_ends = [np.nanmean(values) for values in ends]
            ax.scatter(x_ends, y_ends, s=30, marker="D", edgecolors=colour, facecolors="none", clip_on=False)
            furthest = max(furthest, x_ends[1])
        furthest = max(furthest, x.max())
        ax.set_ylabel(_reward_label(run, stage, name), color=colour)
    drawing.root_scale(axes, furthest)
    axes[-1].set_xlabel(drawing.KL_AXIS)
