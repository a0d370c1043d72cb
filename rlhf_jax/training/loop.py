"""The one loop: resume, step, metrics one step late, samples, checkpoints, and a clean way out.

Knows neither the algorithm nor the model: it is handed a state, a function that makes one step, and where to write.
The protocol: logs are cut back to the restored step; a step's metrics are on disk before its checkpoint; a signal
acts at the next boundary, after a save."""

import dataclasses
import os
import signal
import time
from collections import deque
from collections.abc import Callable

from rlhf_jax.checkpoints.store import CheckpointStore
from rlhf_jax.data.batching import check_fingerprint
from rlhf_jax.errors import Interrupted, NumericsError
from rlhf_jax.parallel import hosts
from rlhf_jax.training import state as states
from rlhf_jax.training.metrics import METRICS_FILE, CompletionsLog, MetricsWriter, truncate_after
from rlhf_jax.training.wandb_writer import WandbWriter

# On the console; everything is in metrics.jsonl.
SHOWN = ("reward", "gold_reward", "kl", "loss", "accuracy", "eval/accuracy", "eval/loss", "eval/reward",
         "eval/gold_reward", "eval/kl", "entropy", "clip_fraction", "tokens_per_second")  # fmt: skip
SKIPS_IN_A_ROW, SKIPS_IN_100 = 3, 10  # non-finite updates that end a run
INVALID_REWARDS = 0.1  # fraction of a step's rewards that may be NaN or infinite


class StopRequest:
    """Set by SIGTERM or Ctrl-C; read at boundaries. A second signal leaves at once."""

    def __init__(self):
        self.requested = False

    def __enter__(self):
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception):
        for which, handler in self._before.items():
            signal.signal(which, handler)

    def _handle(self, number, frame):
        if self.requested:
            os._exit(Interrupted.status)
        self.requested = True

    def check(self, what: str):
        """Between pieces of work that are already on disk; of several processes all are here."""
        if hosts.agree(self.requested):
            raise self.interrupted(what)

    def interrupted(self, what: str) -> Interrupted:
        return Interrupted(
            f"interrupted during {what}; what is done is saved. Run the same command to go on."
        )


@dataclasses.dataclass(frozen=True)
class Logging:
    """How often to write what, in steps."""

    log_every_steps: int
    save_every_steps: int
    samples_every_steps: int
    num_samples: int
    keep_latest: int
    keep_best: int
    tags: dict  # metric name -> another name it is logged under as well
    wandb_project: str = ""  # empty: no Weights & Biases
    watchdog_seconds: float = 300.0  # that a step may take at the least, of several processes


@dataclasses.dataclass(frozen=True)
class StepOutput:
    """metrics: scalars still on the device. finish: host work done one step late -> (more metrics, samples)."""

    metrics: dict
    finish: Callable[[], tuple[dict, list[dict]]] = lambda: ({}, [])


def train(
    stage: str,
    state: states.TrainState,
    step_fn: Callable,  # (state, position) -> (state, StepOutput); position: index of the data batch
    *,
    total_steps: int,
    workdir: str,
    fingerprint: dict,  # of the data; a checkpoint of other data is refused
    logging: Logging,
    console,
    stop: StopRequest,
    start: Callable = lambda state: state,  # run once, when there is no checkpoint yet
    evaluate: Callable = lambda state: {},  # -> metrics, without the prefix eval/
    eval_every_steps: int = 0,
    best_metric: str | None = None,
) -> states.TrainState:
    """Train to `total_steps`, from the newest good checkpoint if there is one.

    Raises: Interrupted after a save on SIGTERM or Ctrl-C; NumericsError after a save when updates or rewards stay
      non-finite; InputError if the checkpoint is of other data or another shape; StorageError if a save fails.
    """
    store = CheckpointStore(
        os.path.join(workdir, "checkpoints", stage),
        keep_latest=logging.keep_latest,
        keep_best=logging.keep_best,
        best_metric=best_metric,
        log=console.note,
    )
    with store:
        restored = store.restore(states.abstract(state))
        if restored is None:
            state = start(state)
        else:
            check_fingerprint(restored.meta["data"], fingerprint)
            state = restored.state
            console.note(f"{stage}: resuming from step {restored.step}")
        position = first = int(state.step)
        hosts.agree_on({f"{stage}: step": first} | {f"{stage}: data, {k}": v for k, v in fingerprint.items()})
        if hosts.is_first():
            truncate_after(os.path.join(workdir, METRICS_FILE), stage, first)
            truncate_after(os.path.join(workdir, "completions", f"{stage}.jsonl"), stage, first)
        vote = hosts.Vote()
        at = lambda what, kind: hosts.beat(
            f"{stage}, step {position + 1}, {what}", f"{stage}, {kind}", logging.watchdog_seconds
        )
        log = _Log(stage, workdir, logging, console, total_steps, first)
        with console.stage(stage, total_steps, first) as progress, log:
            while position < total_steps:
                at("the update", "step")
                state, output = step_fn(state, position)
                log.flush(progress)
                position += 1
                log.pending = (position, output)
                last, stopping = position == total_steps, vote(stop.requested)
                if last or (eval_every_steps and position % eval_every_steps == 0):
                    at("evaluation", "evaluation")
                    log.evaluation = evaluate(state)
                due = last or stopping or position % logging.save_every_steps == 0
                if due:
                    at("reading its metrics", "step")
                    log.flush(progress)
                if due or log.problem:
                    at("the save", "save")
                    meta = {"stage": stage, "position": position, "data": fingerprint}
                    store.save(position, state, meta, log.latest)
                if log.problem or (stopping and not last):
                    at("the save", "save")
                    store.wait()
                    if log.problem:
                        raise NumericsError(f"{stage}, step {position}: {log.problem} The state is saved.")
                    raise stop.interrupted(f"{stage}, step {position} of {total_steps}")
            at("the last save", "save")
            store.wait()
            hosts.beat()
    return state


class _Log:
    """Holds the metrics of one step until the next is under way; then reads, writes and shows them."""

    def __init__(self, stage, workdir, logging, console, total_steps, first):
        self.stage, self.logging, self.console, self.total_steps = stage, logging, console, total_steps
        self.pending, self.evaluation, self.latest, self.problem = None, {}, None, ""
        self.writers, self.completions = [], None
        if hosts.is_first():
            self.writers.append(
                MetricsWriter(workdir, stage, dict(logging.tags), start_step=first, warn=console.warn)
            )
            if logging.wandb_project:
                self.writers.append(WandbWriter(logging.wandb_project, workdir, stage, console.warn))
            self.completions = CompletionsLog(workdir, stage, warn=console.warn)
        self.skips = deque(maxlen=100)
        self.clock = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for writer in self.writers:
            writer.close()
        if self.completions is not None:
            self.completions.close()

    def flush(self, progress):
        if self.pending is None:
            return
        (step, output), self.pending = self.pending, None
        metrics = {name: float(value) for name, value in hosts.gather(output.metrics).items()}
        now = time.monotonic()
        seconds, self.clock = now - self.clock, now
        tokens = metrics.pop("tokens", 0.0)
        metrics |= {"step_seconds": seconds, "tokens_per_second": tokens / max(seconds, 1e-9)}
        more, samples = output.finish()
        metrics |= more
        metrics |= {f"eval/{name}": value for name, value in self.evaluation.items()}
        self.evaluation, self.latest = {}, metrics
        for name, tag in self.logging.tags.items():
            if name in metrics:
                metrics[tag] = metrics[name]
        for writer in self.writers:
            writer.write(step, metrics)
        progress.step(step, {name: metrics[name] for name in SHOWN if name in metrics})
        if (
            self.completions is not None
            and samples
            and (step == 1 or step % self.logging.samples_every_steps == 0 or step == self.total_steps)
        ):
            samples = samples[: self.logging.num_samples]
            self.completions.write(step, samples)
            self.console.samples(f"{self.stage}, step {step}", samples, limit=self.logging.num_samples)
        self._judge(metrics)

    def _judge(self, metrics):
        skipped = metrics.get("skipped_updates", 0.0)
        self.skips.append(skipped > 0)
        if skipped:
            self.console.warn(
                f"{self.stage}: {skipped:.0f} update(s) skipped, loss or gradient was not finite"
            )
        row = list(self.skips)[-SKIPS_IN_A_ROW:]
        if (len(row) == SKIPS_IN_A_ROW and all(row)) or sum(self.skips) >= SKIPS_IN_100:
            self.problem = (
                f"updates were not finite in {sum(self.skips)} of the last {len(self.skips)} steps. "
                "Lower the learning rate, or look at the data of these steps."
            )
        if metrics.get("invalid_reward_fraction", 0.0) > INVALID_REWARDS:
            self.problem = (
                f"{metrics['invalid_reward_fraction']:.0%} of the rewards were NaN or infinite "
                f"(limit {INVALID_REWARDS:.0%}). Look at the reward model."
            )
