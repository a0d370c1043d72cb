"""Helpful and harmless: Bai et al. 2022, "Training a Helpful and Harmless Assistant with RLHF", arXiv:2204.05862.

Data: pairs of replies to a dialogue, and the dialogues as prompts: Anthropic/hh-rlhf.
Published: preference accuracy about 72% at 52B; reward grows about as the square root of KL to the start. The paper
gives neither batch nor rate of its PPO: those, and one pass over 160,000 prompts, are ours."""

from configs import ppo
from configs.recipes import epochs, published


def get_config(size="tiny"):
    config = ppo.get_config(size)
    config.reward_model.update(loss="logexp", center_coeff=0.0)
    config.sampling.temperature = 1.0
    config.ppo.kl_coeff = 0.001
    if published(
        config,
        size,
        "reward_model",
        "ppo",
        prompts="Anthropic/hh-rlhf",
        preferences="Anthropic/hh-rlhf",
        eval_preferences="Anthropic/hh-rlhf#test",
        max_bad_records=0.05,  # empty replies, and dialogues that part before the last
        prompt_tokens=512,
        completion_tokens=128,
    ):
        config.reward_model.update(**epochs(160_800, 1, 64))
        config.ppo.update(num_completions=1, **epochs(160_000, 1, 64))
    return config
