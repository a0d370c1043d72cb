"""One step's rollout of a run: prompts to completions, their rewards, and the targets that the algorithm trains on.

Between rollout.py, which knows arrays, and online.py, which knows steps. Knows no loss and nothing of the loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import packing
from rlhf_jax.data.batching import pad_prompts
from rlhf_jax.data.formats import readable
from rlhf_jax.losses.masking import masked_mean
from rlhf_jax.models import roles
from rlhf_jax.parallel import hosts
from rlhf_jax.rewards import rules
from rlhf_jax.training import rollout
from rlhf_jax.training.algorithms import Algorithm, Network
from rlhf_jax.training.clock import UNTIMED
from rlhf_jax.training.run import Run
from rlhf_jax.training.scoring import Rewards


class Collector:
    """collector(state, prompts, key) -> (prompts, batch with targets, metrics).

    Waits for the device to read texts, to see which groups teach nothing where these are replaced, and how long
    completions are where these are packed; else never.
    """

    def __init__(
        self,
        run: Run,
        section,
        algorithm: Algorithm,
        settings,
        network: Network,
        rewards: Rewards,
        reward,
        suffix: tuple[int, ...] = (),
    ):
        """section: the algorithm's, of the config. reward: the learned reward, a Role or (scored by text) a TextReward;
        None without one.

        suffix: ids that the policy, and nobody else, reads after each prompt.
        """
        self.suffix = suffix
        self.run, self.section, self.rewards, self.reward = run, section, rewards, reward
        self.algorithm, self.settings = algorithm, settings
        self.network, self.sampling = network, run.sampling(section.num_completions)
        self.gold = rules.RULES[run.gold] if run.gold else None
        self.scorer = rollout.make_scorer(network, run.eos_ids)
        self.prepare = rollout.make_prepare(algorithm, settings, network)
        self.max_refills = 0
        if algorithm.teaches is not None:
            self.max_refills = settings.max_refills
            self.teaches = jax.jit(functools.partial(algorithm.teaches, settings))
        self.values_of = rollout.make_values(network)
        self.packs = section.pack_completions

    def __call__(self, state, chosen, key, more=None, *, from_reference=False, parts=UNTIMED):
        """(prompts that it is of, batch, metrics).

        Args:
          chosen: (prompt, ids) each; may be short: the rows that fill the batch weigh nothing.
          more: n -> (as many other prompts, key), pure in n < settings.max_refills: groups that teach nothing are
            replaced by groups of these. None: no group is.
          from_reference: the base's completions in the place of the policy's.
          parts: of the step, on a Clock: `rollout`, whose outputs are the masks of what is sampled, and `score`.
        """
        batch, metrics = self.scored(state, chosen, key, from_reference, parts)
        if self.max_refills and more is not None:
            # How good the policy is, before what it has learned already is left out; the rest of the metrics is of
            # what is trained on.
            first = masked_mean(batch.scores, batch.weights * jnp.isfinite(batch.scores))
            chosen, batch, told = self.refill(state, chosen, batch, more, parts)
            batch = self.packed(batch) if self.packs else batch
            metrics = {"reward": first} | metrics | told
        frozen = {"base": self.run.base}
        if self.settings.reads_policy:
            frozen["policy"] = state.trained["policy"]
        batch, prepared = self.prepare(frozen, state.controllers, batch)
        parts.mark("score", prepared)
        # Rewards are told as they come: normalised ones have the mean 0 whatever the policy does.
        return chosen, batch, prepared | metrics

    def refill(self, state, chosen, batch, more, parts=UNTIMED):
        """(prompts, batch, metrics) with groups that teach in the place of those that do not, while there are any."""
        good, refills = np.array(hosts.gather(self.teaches(batch))), 0
        metrics = {"zero_variance_fraction": 1 - good.mean()}
        while not good.all() and refills < self.max_refills:
            others, key = more(refills)
            extra, _ = self.scored(state, others, key, parts=parts)
            source = np.arange(len(good))
            found = np.flatnonzero(hosts.gather(self.teaches(extra)))
            replaced = np.flatnonzero(~good)[: len(found)]
            source[replaced], good[replaced] = len(good) + found[: len(replaced)], True
            batch = _groups(batch, extra, source)
            chosen, refills = [[*chosen, *others][i] for i in source], refills + 1
        return chosen, batch, metrics | {"refills": refills, "filled_fraction": good.mean()}

    def scored(self, state, chosen, key, from_reference=False, parts=UNTIMED):
        """(batch with scores, metrics of their components)."""
        size = self.section.batch_size
        filled = [*chosen, *chosen[-1:] * (size - len(chosen))]
        batch = self.sample(state, filled, key, from_reference, parts)
        if len(chosen) < size:
            real = np.arange(size)[:, None] < len(chosen)
            batch = batch.replace(weights=batch.weights * real)
        scores, metrics = self.score(state, filled, batch)
        parts.mark("score", scores)
        if self.algorithm.greedy_baseline:
            policy, arrays = state.trained["policy"], self.arrays(filled)
            greedy = rollout.greedy(self.network, self.run.base, policy, arrays, self.sampling)
            parts.mark("rollout", (greedy.prompt_mask, greedy.completion_mask))
            baseline, _ = self.score(state, filled, greedy)  # what is told is of the samples
            parts.mark("score", baseline)
            batch = batch.replace(greedy=greedy.replace(scores=baseline))
        return batch.replace(scores=scores), metrics

    def sample(self, state, chosen, key, from_reference=False, parts=UNTIMED):
        """Completions with log-probabilities, and values if there is a value role."""
        policy, value = state.trained["policy"], state.trained.get("value")
        shared = value is not None and self.section.value == "shared"
        head = value.head if shared else None
        base, asked = self.run.base, None
        if from_reference:
            policy = roles.Role()
        elif self.suffix:
            asked = self.arrays(chosen, self.suffix)
        prompts = self.arrays(chosen)
        batch = rollout.sample(self.network, base, policy, prompts, key, self.sampling, head, asked)
        parts.mark("rollout", (batch.prompt_mask, batch.completion_mask))
        if self.packs and not self.max_refills:
            batch = self.packed(batch)
        if value is not None and not shared:
            batch = batch.replace(old_values=self.values_of(base, value, batch))
        return batch

    def packed(self, batch):
        """The batch with its completions in lanes, where these are fewer slots."""
        lengths = hosts.gather(batch.completion_mask.sum(-1))
        lanes = packing.lanes(lengths, batch.completion_ids.shape[-1])
        return batch if lanes is None else batch.replace(lanes=lanes.replace(start=self.run.put(lanes.start)))

    def score(self, state, chosen, batch):
        """(rewards [B, G], metrics of their components)."""
        scores, told, texts, controllers = None, {}, None, state.controllers
        if self.by_text or not self.rewards.plain:
            texts = rollout.texts(self.run.tokenizer, batch)
        if self.rewards.learned:
            mean, std = controllers["reward_mean"], controllers["reward_std"]
            scores, told = self.learned(chosen, batch, mean, std, texts)
        if self.rewards.plain:
            return scores, told
        weights = batch.weights
        if hosts.several():  # normalised over the whole batch, by each
            scores, weights = hosts.gather((scores, weights))
        total, metrics = self.rewards.total(scores, [prompt for prompt, _ in chosen], texts, weights)
        return self.run.put(np.asarray(total)), metrics | told

    @property
    def by_text(self) -> bool:
        """Whether the learned reward has a tokenizer of its own."""
        return self.rewards.learned and not isinstance(self.reward, roles.Role)

    def learned(self, chosen, batch, mean=0.0, std=1.0, texts=None):
        """(normalised learned rewards [B, G], metrics). texts: of the batch, if they are known."""
        if not self.by_text:
            return self.scorer(self.run.base, self.reward, batch, mean, std)
        texts = texts or rollout.texts(self.run.tokenizer, batch)
        raw = self.reward.score([prompt.text for prompt, _ in chosen], texts)
        mean, std = jax.device_get((mean, std))
        return self.run.put(np.float32((raw - mean) / std)), {}

    def rows(self, chosen, batch):
        """(host metrics, one row a prompt for completions/STAGE.jsonl). Waits for the device."""
        texts = rollout.texts(self.run.tokenizer, batch)[: len(chosen)]
        return rollout.sample_rows([readable(prompt.text) for prompt, _ in chosen], texts, batch, self.gold)

    def reward_statistics(self, batches, key) -> dict:
        """Mean and deviation of the raw learned reward over samples of the reference on batches of prompts."""
        arrays = [self.arrays(chosen) for chosen in batches]
        score = lambda number, batch: self.learned(batches[number], batch)[0]
        return rollout.reward_statistics(self.network, self.run.base, arrays, key, self.sampling, score)

    def arrays(self, chosen, suffix=()):
        run, prompts = self.run, [[*ids, *suffix] for _, ids in chosen]
        return run.put(pad_prompts(prompts, run.prompt_length + len(suffix), run.tokenizer.pad_id))


@jax.jit
def _taken(batch, extra, source):
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y])[source], batch, extra)


def _groups(batch, extra, source):
    """Group n of the result is source[n] of batch and extra put one after the other; it lies as `batch` does."""
    return jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), _taken(batch, extra, source), batch)
