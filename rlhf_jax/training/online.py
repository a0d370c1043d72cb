"""Training on the policy's own samples (PPO and relatives): one step is rollout, rewards, targets, update.

Knows no algorithm: it reads the table. Nothing here waits for the device; samples are read one step late."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batching
from rlhf_jax.errors import InputError
from rlhf_jax.models import heads, readout
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import hosts, sharding
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.training import state as states
from rlhf_jax.training import utilisation
from rlhf_jax.training.algorithms import ALGORITHMS
from rlhf_jax.training.clock import Clock
from rlhf_jax.training.collect import Collector
from rlhf_jax.training.loop import StepOutput, train
from rlhf_jax.training.markers import Markers
from rlhf_jax.training.offline import encode_groups, examples, longest
from rlhf_jax.training.run import Run, announce, optimizer_of, resumable, settings_of
from rlhf_jax.training.scoring import Rewards
from rlhf_jax.training.update import make_update

RATIO_GAP = {"float32": 1e-3, "bfloat16": 0.3}  # largest |ratio - 1| that rounding explains
EVALUATED = ("reward", "reward_std", "gold_reward", "kl", "completion_length", "finished_fraction")


def online(run: Run, name: str) -> None:
    """Sample, score, prepare, update: one step is one rollout."""
    section = run.config[name]
    algorithm, settings = ALGORITHMS[name], settings_of(name, section)
    network = run.network(run.config.sampling.temperature)
    rewards = Rewards(run.config.rewards, run.console.warn, run.mesh)
    reward = run.load_reward() if rewards.learned else None
    rng, base = run.rng(name), run.base
    trained = first_roles(run, section, algorithm, rng, reward)
    frozen = {"base": base}
    prompts = run.encoded_prompts["train"]
    lengths = (run.prompt_length, run.config.data.completion_tokens)
    data = resumable(run, prompts, section.batch_size, lengths)

    updates_a_step = section.rollout_epochs * section.num_minibatches
    fingerprint, auxiliary, rows_of = data.fingerprint(), None, lambda position: None
    if algorithm.auxiliary_objective is not None:
        auxiliary = functools.partial(algorithm.auxiliary_objective, settings, network)
        rows_of, fingerprint["examples"] = example_stream(run, section, updates_a_step)
    update, optimizer, schedule = updater(section, algorithm, settings, network, auxiliary)
    select, memory, markers = selection(run, section, algorithm, settings, lengths)
    first_steps = section.reference_steps if markers else 0
    suffix = markers.best if markers else ()
    collect = Collector(run, section, algorithm, settings, network, rewards, reward, suffix)

    count = utilisation.online_counter(
        run.model.config, section, algorithm, settings, trained, rewards, reward
    )
    peak_flops, clock = utilisation.peak_of(run, count), Clock()

    def step(state, position):
        parts = clock.begin()
        chosen = data.batch(position)

        def more(n):
            """Prompts beyond those of all steps, and a key: by position, so that a resumed run draws the same."""
            n += position * collect.max_refills
            return data.batch(section.steps + n), jax.random.fold_in(jax.random.fold_in(rng, 5), n)

        key = jax.random.fold_in(jax.random.fold_in(rng, 2), position)
        first = position < first_steps
        chosen, batch, metrics = collect(state, chosen, key, more, from_reference=first, parts=parts)
        taught = batch
        if select is not None:
            key = jax.random.fold_in(jax.random.fold_in(rng, 6), position)
            # What is chosen has other completions than the lanes were made for.
            memory, taught = select(state.memory, batch.replace(lanes=None), key)
            state = state.replace(memory=memory)
        state, update_metrics = update(state, frozen, taught, rows_of(position))
        parts.mark("update", update_metrics)
        metrics |= update_metrics | {"learning_rate": schedule(position * updates_a_step)}
        if algorithm.control is not None:
            controllers = algorithm.control(settings, state.controllers, metrics, batch.weights.size)
            state = state.replace(controllers=controllers)

        def finish():
            gap, limit = float(metrics.get("first_ratio_gap", 0.0)), RATIO_GAP[run.config.model.dtype]
            if gap > limit:
                run.console.warn(
                    f"{name}, step {position + 1}: before its first update the policy differs from the one that "
                    f"sampled by a ratio of {gap:.2g} (rounding stays below {limit}): sampler and trainer disagree."
                )
            host, samples = collect.rows(chosen, batch)
            flops = utilisation.online_flops(count, parts, batch, taught, metrics)
            return host | utilisation.told(parts, flops, peak_flops), samples

        return state, StepOutput(metrics, finish)

    def evaluate(state):
        """The rollout's metrics on the held-out prompts, the same random numbers each time."""
        held_out, total = run.encoded_prompts["held_out"], {}
        if not section.eval_every_steps:
            return total
        for first in range(0, len(held_out), section.batch_size):
            chosen = held_out[first : first + section.batch_size]
            _, batch, metrics = collect(state, chosen, jax.random.fold_in(jax.random.fold_in(rng, 4), first))
            metrics = hosts.gather(metrics) | collect.rows(chosen, batch)[0]
            for name, value in metrics.items():
                total[name] = total.get(name, 0.0) + float(value) * len(chosen) / len(held_out)
        clock.current.mark("evaluate")
        return {name: value for name, value in total.items() if name in EVALUATED}

    def start(state):
        """Learned rewards get mean 0 and deviation 1 on samples of the reference."""
        if not rewards.learned:
            return state
        batches = [data.batch(n) for n in range(section.reward_reference_batches)]
        found = collect.reward_statistics(batches, jax.random.fold_in(rng, 3))
        run.console.note(
            f"{name}: raw reward of the reference {found['reward_mean']:.3f} +- {found['reward_std']:.3f}; "
            "rewards below are normalised by these"
        )
        changed = {k: sharding.place(np.float32(v), state.controllers[k].sharding) for k, v in found.items()}
        state = state.replace(controllers=state.controllers | changed)
        if "value" in state.trained and section.value == "reward":
            value = state.trained["value"]
            head = jax.jit(heads.normalised)(value.head, found["reward_mean"], found["reward_std"])
            state = state.replace(trained=state.trained | {"value": value.replace(head=head)})
        return state

    controllers = first_controllers(algorithm, settings)
    with rewards, clock, meshes.activate(run.mesh):
        state = states.create(trained, optimizer, rng, controllers, run.model.config, run.mesh, memory=memory)
        announce(
            run, name, trained, f"{section.batch_size} prompts x {section.num_completions} completions a step"
        )
        state = train(
            name,
            state,
            step,
            total_steps=section.steps,
            workdir=run.workdir,
            fingerprint=fingerprint,
            logging=run.logging(name),
            console=run.console,
            stop=run.stop,
            start=start,
            evaluate=evaluate,
            eval_every_steps=section.eval_every_steps,
            best_metric="eval/reward" if section.eval_every_steps else "reward",
        )
    meta = {k: float(v) for k, v in state.controllers.items()} | {"step": int(state.step)}
    if markers:
        meta |= {"prompt_suffix": markers.texts[-1], "prompt_suffix_ids": list(markers.best)}
    run.save_role(name, state.trained["policy"], meta)


def first_roles(run: Run, section, algorithm, rng, reward) -> dict[str, Role]:
    """What the row trains, before training. reward: the learned one, or None."""
    trained = {"policy": run.new_role(rng, section.train, run.base)}
    if "value" in algorithm.trains:
        trained["value"] = first_value(run, section, jax.random.fold_in(rng, 1), reward)
    return trained


def first_controllers(algorithm, settings) -> dict[str, float]:
    controllers = {**settings.kl_controllers, "reward_mean": 0.0, "reward_std": 1.0}
    return controllers | dict.fromkeys(algorithm.controllers, 0.0)


def updater(section, algorithm, settings, network, auxiliary=None):
    """(jitted update of a step's rollout, optimizer, its learning rate by update)."""
    updates = section.steps * section.rollout_epochs * section.num_minibatches
    optimizer, schedule = optimizer_of(section, updates)
    if algorithm.optimizer is not None:
        optimizer = algorithm.optimizer(settings, optimizer)
    update = make_update(
        functools.partial(algorithm.objective, settings, network),
        optimizer,
        epochs=section.rollout_epochs,
        num_minibatches=section.num_minibatches,
        num_microbatches=section.num_microbatches,
        auxiliary_objective=auxiliary,
        stop_kl=section.stop_approx_kl,
        extras=algorithm.extras and functools.partial(algorithm.extras, settings, network),
    )
    return sharding.in_place(update), optimizer, schedule


def selector(algorithm, settings, mesh):
    """Jitted (memory, batch, key) -> (memory, batch to train on), or None of a row that trains on what it sampled."""
    if algorithm.select is None:
        return None
    return jax.jit(
        functools.partial(algorithm.select, settings),
        donate_argnums=0,
        out_shardings=(sharding.replicated(mesh), sharding.batch_sharding(mesh)),
    )


def selection(run: Run, section, algorithm, settings, lengths):
    """(jitted select or None, first memory or None, markers of its quantiles or None) of a row that chooses."""
    memory = markers = None
    if algorithm.memory is not None:
        room = run.model.config.max_position - sum(lengths) - 1
        markers = Markers.of(run.tokenizer, section.reward_token, section.num_quantiles, room)
        memory = algorithm.memory(settings, markers.padded(run.tokenizer.pad_id), *lengths)
    return selector(algorithm, settings, run.mesh), memory, markers


def example_stream(run: Run, section, updates_a_step: int):
    """(position -> examples of that step, [updates, ptx_batch_size, ...]; what identifies them)."""
    records = encode_groups(run, examples(run, "ptx"))
    lengths, size = longest(records), section.ptx_batch_size
    data = resumable(run, records, updates_a_step * size, lengths)
    cut = lambda x: x.reshape(updates_a_step, size, *x.shape[1:])

    def rows_of(position):
        prompts, completions = zip(*data.batch(position), strict=True)
        fixed = dict(prompt_length=lengths[0], completion_length=lengths[1], pad_id=run.tokenizer.pad_id)
        return run.put(jax.tree.map(cut, batching.group(prompts, completions, **fixed)), axis=1)

    return rows_of, data.fingerprint()["all_records"]


def first_value(run: Run, section, rng, reward) -> Role:
    """The value role before training, by config.value.

    shared: a head of zeros on the policy's states. own: such a head on an adapter (or weights) of its own. reward: the
    reward model, as in Ziegler et al. 2019, its head put into normalised units once these are known.
    """
    if section.value == "reward":
        if reward is None:
            raise InputError(
                "config.ppo.value is 'reward', but config.rewards.components has no 'learned' to start from."
            )
        if not isinstance(reward, Role):
            raise InputError(
                "config.ppo.value is 'reward', but the reward model is no decoder; expected own or shared."
            )
        head = readout.linear_head(reward.readout, reward.head)
        value = reward.replace(pooling="last", head=head, readout=readout.Readout())
        return jax.tree.map(lambda x: jnp.array(x, copy=True), value)
    head = heads.init_value(run.model.config.hidden_size)
    if section.value == "shared":
        return Role(head=head)
    return run.new_role(rng, section.train, run.base, head)
