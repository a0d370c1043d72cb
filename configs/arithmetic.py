"""GRPO on a task that can be checked: sums of two numbers below 50, two worked examples before each.

python -m experiments.run --config=configs/arithmetic.py:smollm2 --workdir=runs/arithmetic
The reward is 1 where the first line is the right number, else 0: no reward model, no preferences."""

from configs import grpo


def get_config(size="tiny"):
    config = grpo.get_config(size)
    config.stages = ("grpo", "evaluation")
    config.gold = ""  # the rewards are the truth
    config.data.update(prompts="packaged:arithmetic", prompt_tokens=32, completion_tokens=6)
    config.rewards.components = ("exact_match:first_line=true",)
    config.grpo.update(num_completions=8, kl_loss_coeff=0.04)
    if size == "smollm2":
        config.grpo.update(batch_size=16, steps=30)
        config.grpo.optimizer.update(learning_rate=1e-3, warmup_steps=4)
        config.evaluation.batch_size = 48
    return config
