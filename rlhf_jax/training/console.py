"""What a user watches: a progress bar and tables in a terminal, plain lines in a log or a pipe.

Text of models and data is printed as it is, never as markup, and without control characters: a completion
cannot colour, move or clear the screen. Knows nothing of training."""

import contextlib
import logging
import re
import sys
import time

# Shown first and, beside a bar, alone; a plain line shows the rest of what it was given after them.
HEADLINE = ("reward", "gold_reward", "kl", "loss", "accuracy", "tokens_per_second")
SHORT = {"gold_reward": "gold", "tokens_per_second": "tokens/s", "learning_rate": "lr"}
PLAIN_WIDTH = 120
CELL_CHARACTERS = 220

ESCAPE_SEQUENCES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_].*?(?:\x07|\x1b\\)|\x1b[ -/]*[0-~]", re.DOTALL
)
# C0 but for tab and newline, DEL, C1, and the marks that reorder text (bidi overrides and isolates).
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029]")
SURROGATES = re.compile("[\ud800-\udfff]")


def clean(text):
    """`text` without terminal escape sequences, control characters and lone surrogates."""
    return SURROGATES.sub("\ufffd", CONTROLS.sub("", ESCAPE_SEQUENCES.sub("", str(text))))


def duration(seconds):
    """Seconds as 0:07, 12:30 or 3:05:00."""
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def describe(metrics, names=None):
    """ "reward 1.2  kl 3.4": the headline metrics first, then the others (or only `names`)."""
    order = [name for name in HEADLINE if name in metrics]
    order += [name for name in metrics if name not in order] if names is None else []
    return "  ".join(f"{SHORT.get(name, name)} {_value(metrics[name])}" for name in order)


def _value(value):
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    value = float(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


class Console:
    """One for a run. In a multi-process run only the first process should have one that is not `quiet`."""

    def __init__(self, file=None, log_every_steps=1, quiet=False, width=None, terminal=None):
        """
        Args:
          file: where to print, standard output if None.
          log_every_steps: without a terminal, the steps between two lines.
          quiet: print nothing.
          width, terminal: taken from `file` if None.
        """
        from rich.console import Console as RichConsole

        file = file or sys.stdout
        live = file.isatty() if terminal is None else terminal
        self.rich = RichConsole(
            file=file,
            width=width or (None if live else PLAIN_WIDTH),
            force_terminal=live,
            quiet=quiet,
            markup=False,
            emoji=False,
            highlight=False,
        )
        self.live, self.quiet = live and not quiet, quiet
        self.log_every_steps = log_every_steps
        self.told = set()  # lines of `heard`

    @contextlib.contextmanager
    def stage(self, name, total_steps, start=0):
        """Shows the progress of one stage; `start` is the step it resumes from. Gives an object with
        step()."""
        where = f"from step {start} to {total_steps}" if start else f"{total_steps} steps"
        self.note(f"{name}: {where}")
        progress = (
            _Bar(self, name, total_steps, start) if self.live else _Lines(self, name, total_steps, start)
        )
        began = time.monotonic()
        try:
            with progress:
                yield progress
        except BaseException:
            self.note(f"{name}: stopped at step {progress.last} after {duration(time.monotonic() - began)}")
            raise
        self.note(f"{name}: done in {duration(time.monotonic() - began)}")

    def note(self, text):
        """A plain line; above the bar where there is one."""
        self._print(text)

    def warn(self, text):
        self._print(f"warning: {text}", style="yellow")

    @contextlib.contextmanager
    def heard(self, name):
        """What the logger `name` says meanwhile, its INFO too, is printed here, each line once in a run."""
        logger, handler = logging.getLogger(name), logging.Handler()
        handler.emit = self._hear
        before = logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before[0])
            logger.propagate = before[1]

    def _hear(self, record):
        text = record.getMessage()
        if text not in self.told:
            self.told.add(text)
            (self.warn if record.levelno >= logging.WARNING else self.note)(text)

    def table(self, title, columns, rows):
        """Cells are strings, numbers or None; columns that hold numbers are aligned right."""
        from rich.table import Table
        from rich.text import Text

        rows = [list(row) for row in rows]
        table = Table(title=Text(self._safe(title)), title_justify="left", expand=False)
        for i, column in enumerate(columns):
            numeric = any(row[i] is not None and not isinstance(row[i], str) for row in rows)
            # Text columns share what the numbers leave, and wrap; a number is never cut.
            table.add_column(
                Text(self._safe(column)),
                justify="right" if numeric else "left",
                no_wrap=numeric,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*(Text(self._safe(_value(cell))) for cell in row))
        self.rich.print(table)

    def samples(self, title, rows, limit=3):
        """rows: dicts with prompt, completion and any of reward, gold_reward, kl; the first `limit` are
        shown."""
        rows = list(rows)[:limit]
        numbers = [
            name for name in ("reward", "gold_reward", "kl") if any(row.get(name) is not None for row in rows)
        ]
        columns = ["prompt", "completion", *(SHORT.get(name, name) for name in numbers)]
        cells = [
            [_cell(row.get("prompt", ""), keep_end=True), _cell(row.get("completion", ""))]
            + [row.get(name) for name in numbers]
            for row in rows
        ]
        self.table(title, columns, cells)

    def _print(self, text, style=None):
        from rich.text import Text

        # soft_wrap: a line of a log stays one line, whatever the width.
        self.rich.print(Text(self._safe(text), style=style or ""), soft_wrap=True)

    def _safe(self, text):
        """clean(), with what the stream's encoding cannot hold (LANG=C) as question marks."""
        encoding = self.rich.encoding or "utf-8"
        return clean(text).encode(encoding, "replace").decode(encoding)


def _cell(text, keep_end=False):
    """One paragraph of bounded length; a prompt keeps its end, which the completion goes on from."""
    text = clean(text).replace("\n", "\\n").replace("\t", " ")
    if len(text) <= CELL_CHARACTERS:
        return text
    return "..." + text[3 - CELL_CHARACTERS :] if keep_end else text[: CELL_CHARACTERS - 3] + "..."


class _Lines:
    """Progress as lines, for logs: the first step given, then every log_every_steps, and the last."""

    def __init__(self, console, name, total_steps, start):
        self._console, self._name, self._total, self._start = console, name, total_steps, start
        self.last, self._printed, self._timer = start, None, None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False

    def step(self, step, metrics=None):
        """`step` steps are done. Without metrics (not read at this step) nothing is printed."""
        self.last = step
        if metrics is None:
            return
        due = self._printed is None or step - self._printed >= self._console.log_every_steps
        if due or step >= self._total:
            self._printed = step
            parts = (f"{self._name} {step}/{self._total}", describe(metrics), self._left(step))
            self._console.note("  ".join(part for part in parts if part))

    def _left(self, step):
        """Time left, from the pace since the first step given: the one before it was mostly compiling."""
        if self._timer is None:
            self._timer = (step, time.monotonic())
        first, began = self._timer
        if step <= first or step >= self._total:
            return ""
        return f"{duration((time.monotonic() - began) / (step - first) * (self._total - step))} left"


class _Bar:
    """Progress as one live line in a terminal."""

    def __init__(self, console, name, total_steps, start):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        metrics = TextColumn(
            "{task.fields[shown]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
        )
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            metrics,
        )
        # A long window, because one step may take a minute.
        self._progress = Progress(*columns, console=console.rich, expand=True, speed_estimate_period=600.0)
        for column in columns:
            if hasattr(column, "markup"):
                column.markup = False
        self._task = self._progress.add_task(
            console._safe(name), total=total_steps, completed=start, shown="compiling, the first step is slow"
        )
        self._safe, self.last, self._steps_seen = console._safe, start, 0

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, *exception):
        self._progress.stop()
        return False

    def step(self, step, metrics=None):
        """`step` steps are done; without metrics the last ones stay in view."""
        self.last = step
        shown = {} if metrics is None else {"shown": self._safe(describe(metrics, HEADLINE))}
        self._progress.update(self._task, completed=step, **shown)
