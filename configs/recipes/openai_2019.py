"""Stylistic continuation: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", arXiv:1909.08593.

Data: openings of 32 to 64 tokens from books (prompts), comparisons of 24-token continuations for positive sentiment or
vivid description (preferences; the paper asks for the best of four, which is three pairs).
Published: with 5,000 labels, people prefer the tuned GPT-2 774M to the untuned one 86% of the time."""

from configs import ppo
from configs.recipes import epochs, published


def get_config(size="tiny"):
    config = ppo.get_config(size)
    config.sampling.temperature = 0.7
    config.ppo.update(
        kl_coeff=0.15,
        kl_control="adaptive",
        kl_target=6.0,
        gae_lambda=0.95,
        value_coeff=0.1,
        whiten_rewards=True,
        missing_eos_rule="replace",  # a continuation that does not end its sentence is worth -1
        missing_eos_value=-1.0,
        rollout_epochs=4,
        num_minibatches=1,
    )
    if published(
        config,
        size,
        "reward_model",
        "ppo",
        prompts="data/stylistic/prompts.jsonl",
        preferences="data/stylistic/preferences.jsonl",
        prompt_tokens=64,
        completion_tokens=24,
    ):
        config.sampling.min_new_tokens = 16  # the sentence is cut at the first full stop after 16 tokens
        config.reward_model.update(train="full", **epochs(5_000, 1, 8))
        config.reward_model.optimizer.update(learning_rate=1.77e-5, warmup_steps=0)
        config.ppo.update(train="full", num_completions=1, **epochs(2_000_000, 1, 1024))
        config.ppo.optimizer.update(learning_rate=1.41e-5, warmup_steps=0, eps=1e-5)
    return config
