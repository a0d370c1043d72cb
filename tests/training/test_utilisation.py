"""The count of a step's passes: each kind of row, by hand from the forward pass of its tokens."""

import types

import numpy as np
import pytest

from rlhf_jax.data import packing
from rlhf_jax.models.arithmetic import Tokens, forward
from rlhf_jax.models.roles import Role
from rlhf_jax.training import utilisation
from rlhf_jax.training.algorithms import ALGORITHMS
from rlhf_jax.training.algorithms.gating import GATING
from rlhf_jax.types import GroupedBatch

TINY = types.SimpleNamespace(vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2,
                             num_kv_heads=1, head_dim=2)  # fmt: skip
ADAPTED, FULL, HEAD = Role(adapter={}), Role(base={}), Role(head={})
MASKS = np.array([[0, 1, 1, 1]]), np.array([[[1, 1, 0], [1, 0, 0]]])  # P 3 of 4, R 2 and 1 of 3
ONE = forward(TINY, Tokens.of_groups([3], [[2, 1]]))
SHALLOW = forward(TINY, Tokens.of_groups([3], [[2, 1]]), 1)


def counter(name, trained, reward=None, by_model=False, epochs=1, **settings):
    section = types.SimpleNamespace(rollout_epochs=epochs, num_minibatches=2)
    rewards = types.SimpleNamespace(learned=reward is not None, by_model=by_model)
    row = ALGORITHMS[name]
    return utilisation.online_counter(TINY, section, row, row.settings(**settings), trained, rewards, reward)


def test_ppo_samples_scores_and_trains():
    shared = counter("ppo", {"policy": ADAPTED, "value": HEAD}, Role(adapter={}, depth=1), epochs=4)
    expected = 2 * ONE.times(1, 1, 1) + SHALLOW.times(1, 0, 1) + 4 * ONE.times(2)
    assert shared([MASKS], MASKS, MASKS) == pytest.approx(expected)
    # 3 of 8 updates were made before the policy was too far.
    assert shared([MASKS], MASKS, MASKS, 3.0) == pytest.approx(expected - 2.5 * ONE.times(2))
    own = counter("ppo", {"policy": FULL, "value": Role(base={}, head={})}, epochs=4)
    expected = 2 * ONE.times(1, 1, 1) + ONE.times(1, 0, 1) + 4 * (ONE.times(3) + ONE.times(3, 0))
    assert own([MASKS], MASKS, MASKS) == pytest.approx(expected)


def test_groups_that_are_refilled_and_ensembles_count_for_each_rollout():
    ensemble = Role(members=(ADAPTED, Role(adapter={}, depth=1)))
    count = counter("grpo", {"policy": ADAPTED}, ensemble, kl_coeff=0.0, kl_loss_coeff=0.0)
    each = ONE.times(1, 1, 1) + ONE.times(1, 0, 1) + SHALLOW.times(1, 0, 1)
    assert count([MASKS] * 3, MASKS, MASKS) == pytest.approx(3 * each + ONE.times(2))
    referred = counter("grpo", {"policy": ADAPTED}, kl_loss_coeff=0.04, top_entropy_quantile=0.2)
    assert referred([MASKS], MASKS, MASKS) == pytest.approx(3 * ONE.times(1, 1, 1) + ONE.times(2))


def test_what_is_not_known_has_no_count():
    both = {"policy": ADAPTED, "value": HEAD}
    for name in ("trpo", "ppo_ptx", "quark"):
        assert counter(name, both) is None, name
    assert counter("ppo", both, kl_kind="exact") is None
    assert counter("grpo", both, kl_loss_kind="exact") is None
    assert counter("ppo", both, reward="an encoder") is None and counter("ppo", both, by_model=True) is None
    offline = lambda name, **values: utilisation.offline_counter(
        TINY, ALGORITHMS[name], ALGORITHMS[name].settings(**values), {"policy": ADAPTED, "reward": HEAD}
    )
    assert offline("kto") is None and offline("dpo", wpo=True) is None
    settings = ALGORITHMS["reward_model"].settings()
    assert utilisation.offline_counter(TINY, GATING, settings, {"reward": Role(gate={})}) is None
    parts = types.SimpleNamespace(seconds=lambda: {"time/update": 1.0})
    assert utilisation.told(parts, None, 1.0) == {"time/update": 1.0}
    assert utilisation.online_flops(None, None, None, None, {}) is None


def test_offline_rows():
    def flops(name, role, **values):
        row = ALGORITHMS[name]
        trained = dict.fromkeys(row.trains, role)
        batch = GroupedBatch(None, MASKS[0], None, MASKS[1], weights=None)
        return utilisation.offline_counter(TINY, row, row.settings(**values), trained)(batch)

    assert flops("sft", FULL) == ONE.times(3) and flops("orpo", ADAPTED) == ONE.times(2)
    assert flops("dpo", ADAPTED) == ONE.times(2) + ONE.times(1, 1, 1)
    assert flops("dpo", ADAPTED, reference="cached") == ONE.times(2)
    assert flops("reward_model", Role(adapter={}, head={}, depth=1)) == SHALLOW.times(2, 0)


def test_packed_examples_read_only_themselves():
    rows = [[([5, 6], [[7, 8]]), ([], [[5, 6]])], [([5], [[6]])]]
    batch = packing.batch(rows, row_tokens=8, pad_id=0, batch_size=4)
    # Learned: two, and one each of those of two tokens, whose first nothing predicts.
    assert utilisation.tokens_of(batch) == Tokens.of_texts([4, 2, 2], predicted=4)


def test_utilisation_leaves_evaluation_out_and_idle_time_in():
    times = {"time/other": 1.0, "time/update": 3.0, "time/evaluate": 50.0}
    told = utilisation.told(types.SimpleNamespace(seconds=lambda: dict(times)), 8e9, 1e10)
    assert told == times | {"mfu": pytest.approx(0.2)}
