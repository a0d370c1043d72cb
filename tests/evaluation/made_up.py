"""Workdirs of runs that never were: what the report and its warning signs are tried on."""

import json

import numpy as np

ATTACK = '<script>alert(1)</script><img src=x onerror=alert(2)> "quoted" \x1b[31m\u202e \ud83c $x^2$'


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def noise(count, seed=0):
    return np.random.default_rng(seed).normal(size=count)


def rising(count, start, end):
    return start + (end - start) * (1 - np.exp(-np.arange(count) / (count / 4)))


def metric_rows(stage="ppo", count=60, **series):
    """One row a step; each metric an array of `count`."""
    columns = {name: np.broadcast_to(values, count).tolist() for name, values in series.items()}
    return [
        {
            "stage": stage,
            "step": i + 1,
            "time": 1.0 + i,
            **{name: column[i] for name, column in columns.items()},
        }
        for i in range(count)
    ]


def good_rl(count=60):
    return metric_rows(
        count=count,
        reward=rising(count, 0.0, 1.5) + 0.1 * noise(count),
        reward_std=1.0,
        gold_reward=rising(count, 0.1, 0.6) + 0.05 * noise(count, 1),
        kl=rising(count, 0.0, 6.0),
        entropy=rising(count, 3.0, 2.4),
        loss=0.1,
        explained_variance=rising(count, -0.2, 0.6),
        clip_fraction=0.05,
        completion_length=20.0,
        mfu=0.25,
        **{
            "time/rollout": 1.0,
            "time/score": 0.5,
            "time/update": 2.0,
            "time/other": 0.5,
            "step_seconds": 4.0,
        },
    )


def good_reward_model(count=40):
    rows = metric_rows(
        "reward_model", count, loss=rising(count, 0.69, 0.55), accuracy=rising(count, 0.5, 0.74), margin=0.5
    )
    rows[9]["eval/accuracy"], rows[39]["eval/accuracy"] = 0.6, 0.7
    return rows


def evaluation(count=24, reward_gain=1.5, gold_gain=0.5, kl=6.0, length_ratio=1.0):
    reward, gold = noise(count, 2), 0.2 * noise(count, 3)
    return {
        "num_prompts": count,
        "untuned": {
            "reward": reward.tolist(),
            "gold_reward": gold.tolist(),
            "completion_length": [20.0] * count,
            "finished": [False] * count,
        },
        "tuned": {
            "reward": (reward + reward_gain + 0.1 * noise(count, 4)).tolist(),
            "gold_reward": (gold + gold_gain + 0.1 * noise(count, 5)).tolist(),
            "completion_length": [20.0 * length_ratio] * count,
            "finished": [i % 2 == 0 for i in range(count)],
            "kl": (kl + 0.3 * noise(count, 6)).tolist(),
        },
        "prompts": [f"prompt {i}" for i in range(count)],
        "gold_name": "sentiment (VADER compound, -1..1)",
        "summary": {"reward_gain": reward_gain},
        "sampling": {"temperature": 1.0, "max_new_tokens": 20},
    }


def answers(texts):
    return [
        {"inputs": {"inputs_pretokenized": f"prompt {i}", "targets_pretokenized": ""}, "prediction": text}
        for i, text in enumerate(texts)
    ]


def varied(count=24, seed=0):
    """Completions with few word pairs in common."""
    draw = np.random.default_rng(seed)
    return [" ".join(f"w{k}" for k in draw.integers(0, 300, 15)) for _ in range(count)]


def fill(path):
    """A workdir with every file of a good run, and hostile text in each place that text can come from."""
    untuned, tuned = varied(seed=1), varied(seed=2)
    tuned[2] = ATTACK
    write_lines(path / "eval_results_untuned.jsonl", answers(untuned))
    write_lines(path / "eval_results_tuned.jsonl", answers(tuned))
    write_lines(path / "metrics.jsonl", good_reward_model() + metric_rows("sft", 5, loss=1.0) + good_rl())
    samples = [
        {"step": s, "prompt": ATTACK, "completion": ATTACK, "reward": 1.0, "kl": None} for s in range(1, 9)
    ]
    write_lines(path / "completions" / "ppo.jsonl", samples)
    scores = noise(50, 7)
    files = {
        "config": {"model": ATTACK, "stages": ["reward_model", "ppo"]},
        "evaluation": evaluation(),
        "environment": {"versions": {"jax": "0.10.2"}, "seed": 0},
        "timing": {
            "phases": [["reward model", 61.0], [ATTACK, 3.0]],
            "peak_memory_bytes": 2**31,
            "peak_flops_source": ATTACK,
        },
        "reward_model": {
            "train_pairs": 1000,
            "held_out_pairs": 200,
            "accuracy": 0.70,
            "gold_accuracy": 0.8,
            "ceiling": 0.76,
            "calibration": [[0.2, 0.25, 10], [0.5, 0.5, 30], [0.8, 0.7, 10]],
            "chosen": (scores + 0.5).tolist(),
            "rejected": (scores - 0.5).tolist(),
            "gold": [[float(s), float(s > 0)] for s in scores],
        },
    }
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
