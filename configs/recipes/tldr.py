"""TL;DR: Stiennon et al. 2020, "Learning to summarize from human feedback", arXiv:2009.01325.

Settings of its reproduction, Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", arXiv:2403.17031.
Data: Reddit posts with their authors' summaries (sft, prompts), pairs of summaries (preferences).
Published: people prefer the 1.3B model's summaries to the authors' own 61% of the time, 43% for supervised 12B."""

from configs import ppo
from configs.recipes import epochs, published


def get_config(size="tiny"):
    config = ppo.get_config(size)
    config.sampling.temperature = 0.7
    config.ppo.update(
        kl_coeff=0.05,
        gae_lambda=0.95,
        value="reward",  # the critic starts as the reward model
        value_coeff=0.1,
        missing_eos_rule="replace",
        missing_eos_value=-1.0,
        rollout_epochs=4,
        num_minibatches=1,
    )
    if published(
        config,
        size,
        "sft",
        "reward_model",
        "ppo",
        sft="trl-lib/tldr",
        prompts="trl-lib/tldr",
        preferences="openai/summarize_from_feedback:comparisons",
        eval_preferences="openai/summarize_from_feedback:comparisons#validation",
        max_bad_records=0.01,
        prompt_tokens=512,
        completion_tokens=53,
    ):
        config.sft.update(train="full", **epochs(116_722, 1, 128))
        config.reward_model.update(train="full", center_coeff=0.0, **epochs(92_832, 1, 64))
        config.ppo.update(train="full", num_completions=1, **epochs(1_000_000, 1, 512))
        for stage in (config.sft, config.reward_model, config.ppo):
            stage.optimizer.update(learning_rate=3e-6, schedule="cosine", warmup_steps=0, eps=1e-5)
    return config
