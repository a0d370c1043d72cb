"""Best-of-n: the sample of n that a reward likes most, as a policy to compare tuned ones with, and its curve over n.

Knows arrays of rewards; nothing of what made them. Sources: Nakano et al. 2021, arXiv:2112.09332, appendix I, and Gao
et al. 2022, arXiv:2210.10760 (the estimator); Beirami et al. 2024, arXiv:2401.01879 (why the KL is a bound)."""

import numpy as np


def kl_bound(n):
    """log n - (n - 1) / n nats: at least KL(best of n || the sampler), and near it where no two samples are alike."""
    n = np.asarray(n, np.float64)
    return np.log(n) - (n - 1) / n


def best_of_n_curve(proxy, gold, ns) -> dict[str, np.ndarray]:
    """Expected proxy and gold reward of the sample with the highest proxy among n, from N samples without bias.

    The mean over all subsets of size n, in closed form: sample i of the N sorted by proxy, from 1, is the best of
    C(i-1, n-1) of C(N, n) subsets. Samples of equal proxy are equally likely to be taken.
    Args:
      proxy, gold: [..., N], samples of one prompt along the last axis. ns: sizes from 1 to N.
    Returns: {"n": [K], "proxy": [..., K], "gold": [..., K], "kl": [K] nats, an upper bound}, float64.
    Raises: ValueError for other shapes or sizes, or a proxy that is NaN.
    """
    proxy, gold, ns = np.asarray(proxy, np.float64), np.asarray(gold, np.float64), np.asarray(ns, np.int64)
    N = proxy.shape[-1]
    if proxy.shape != gold.shape or np.isnan(proxy).any():
        raise ValueError(f"proxy {proxy.shape} and gold {gold.shape} must have one shape and proxy no NaN.")
    if not len(ns) or ns.min() < 1 or ns.max() > N:
        raise ValueError(f"ns is {ns.tolist()}; expected sizes from 1 to the number of samples, {N}.")
    weights = np.stack([_chances(int(n), N) for n in ns], axis=-1)  # [N, K]
    order = np.argsort(proxy, axis=-1, kind="stable")
    proxy, gold = (np.take_along_axis(x, order, axis=-1) for x in (proxy, gold))
    for index in np.ndindex(proxy.shape[:-1]):
        _, group, count = np.unique(proxy[index], return_inverse=True, return_counts=True)
        gold[index] = (np.bincount(group, weights=gold[index]) / count)[group]
    return {"n": ns, "proxy": proxy @ weights, "gold": gold @ weights, "kl": kl_bound(ns)}


def means_by_n(found: dict, n: int) -> dict:
    """{"n", "reward", "kl" and, where there is one, "gold_reward"}: of the best of 1, 2, 4, ... n, each a list.

    found: of side_by_side.completions_of with rounds=n; means over prompts, from all their samples.
    """
    proxy = np.asarray(found["reward"], np.float64)
    proxy = np.where(np.isfinite(proxy), proxy, np.nanmin(proxy, where=np.isfinite(proxy), initial=np.inf))
    gold = found.get("gold_reward", proxy)
    ns = sorted({2**i for i in range(n.bit_length())} | {n})
    made = best_of_n_curve(proxy, gold, ns)
    curve = {"n": ns, "reward": made["proxy"].mean(0).tolist(), "kl": made["kl"].tolist()}
    if "gold_reward" in found:
        curve["gold_reward"] = made["gold"].mean(0).tolist()
    return curve


def choose(found: dict, n: int) -> dict:
    """Of side_by_side.completions_of with rounds=n, as [N][n G]: the best by "reward" of each G, as [N][G].

    "kl" gets the bound added: log-ratios of the chosen to where KL is measured from, and the choosing itself.
    """
    texts, arrays = found["texts"], {name: np.asarray(x) for name, x in found.items() if name != "texts"}
    N, G = len(texts), len(texts[0]) // n
    rounds = {name: x.reshape(N, n, G) for name, x in arrays.items()}
    scores = rounds["reward"].astype(np.float64)
    best = np.where(np.isnan(scores), -np.inf, scores).argmax(1)  # [N, G]
    chosen = {name: np.take_along_axis(x, best[:, None], axis=1)[:, 0] for name, x in rounds.items()}
    if "kl" in chosen:
        chosen["kl"] = chosen["kl"] + kl_bound(n)
    return {"texts": [[texts[b][best[b, g] * G + g] for g in range(G)] for b in range(N)], **chosen}


def _chances(n, N):
    """[N], C(i-1, n-1) / C(N, n) for i = 1 .. N: from the last, n / N, downwards, so that nothing overflows."""
    chances = np.zeros(N)
    chances[N - 1] = n / N
    for i in range(N, n, -1):
        chances[i - 2] = chances[i - 1] * (i - n) / (i - 1)
    return chances
