"""Best-of-n against all subsets; the choosing against loops."""

import itertools
import math

import numpy as np
import pytest

from rlhf_jax.evaluation.best_of_n import best_of_n_curve, choose, kl_bound


def over_all_subsets(proxy, gold, n):
    """(mean proxy, mean gold) of the best of n; of equal proxies each as often as another."""
    proxies, golds = [], []
    for subset in itertools.combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in subset)
        proxies.append(best)
        golds.append(np.mean([gold[i] for i in subset if proxy[i] == best]))
    return np.mean(proxies), np.mean(golds)


@pytest.mark.parametrize("seed", range(3))
def test_the_curve_is_the_mean_over_all_subsets(seed):
    rng = np.random.default_rng(seed)
    # Few values: many ties, between samples of different gold.
    proxy, gold = rng.integers(0, 4 + 96 * (seed > 0), (2, 7)).astype(float), rng.normal(size=(2, 7))
    curve = best_of_n_curve(proxy, gold, range(1, 8))
    for row, n in itertools.product(range(2), range(1, 8)):
        expected = over_all_subsets(proxy[row], gold[row], n)
        np.testing.assert_allclose(curve["proxy"][row, n - 1], expected[0], rtol=1e-12)
        np.testing.assert_allclose(curve["gold"][row, n - 1], expected[1], rtol=1e-10)
    np.testing.assert_allclose(curve["proxy"][:, [0, -1]], np.stack([proxy.mean(1), proxy.max(1)], 1))


def test_many_samples_do_not_overflow():
    curve = best_of_n_curve(np.arange(4096.0), np.arange(4096.0), [1, 2048, 4096])
    # E[max of n without replacement from 0 .. N - 1] = n (N + 1) / (n + 1) - 1.
    np.testing.assert_allclose(curve["gold"], [2047.5, 2048 * 4097 / 2049 - 1, 4095], rtol=1e-9)


def test_the_bound():
    np.testing.assert_allclose(kl_bound([1, 2, 16]), [0, math.log(2) - 0.5, math.log(16) - 15 / 16])
    # Two samples from p = (a, 1 - a), the better one liked: KL is known, and the bound is above it.
    for a in (0.1, 0.5, 0.9):
        worse = a * a
        exact = worse * math.log(worse / a) + (1 - worse) * math.log((1 - worse) / (1 - a))
        assert 0 < exact < kl_bound(2)


@pytest.mark.parametrize("ns", [[0], [8], []])
def test_sizes_that_cannot_be(ns):
    with pytest.raises(ValueError, match="from 1 to"):
        best_of_n_curve(np.zeros(7), np.zeros(7), ns)


def test_each_completion_is_the_best_of_its_own_n():
    n, G, N = 3, 2, 4
    rng = np.random.default_rng(0)
    reward = rng.normal(size=(N, n * G))
    reward[0, 0] = np.nan
    texts = [[f"{b}.{i}" for i in range(n * G)] for b in range(N)]
    found = choose({"texts": texts, "reward": reward, "kl": np.zeros((N, n * G))}, n)
    for b, g in itertools.product(range(N), range(G)):
        own = [i for i in range(n * G) if i % G == g and not np.isnan(reward[b, i])]
        best = max(own, key=lambda i: reward[b, i])
        assert found["texts"][b][g] == texts[b][best] and found["reward"][b, g] == reward[b, best]
    np.testing.assert_allclose(found["kl"], kl_bound(3))
