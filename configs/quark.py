"""Quark: learn what each quantile of the reward looks like, and ask for the best.   --config=configs/quark.py:tiny

Lu et al. 2022, arXiv:2205.13636. The tuned policy reads the text of the best quantile after each prompt: evaluation and
export know it (prompt_suffix in roles/quark/role.json)."""

from configs import common


def get_config(size="tiny"):
    config = common.from_reward(
        size,
        "quark",
        num_quantiles=5,
        reward_token=" {}",  # text after the prompt, {} the quantile: 1 the worst, num_quantiles the best
        reference_steps=2,  # first steps, whose completions are the reference's, given the prompt alone
        pool_size=4096,  # completions of the last steps that are learned from; the oldest leave first
        kl_loss_coeff=0.05,  # of KL(reference || policy) over the whole vocabulary, nats a token; 0: none
    )
    # Rewards are compared across steps: kl_coeff stays fixed, and config.rewards.normalise none.
    config.quark.update(kl_coeff=0.0, rollout_epochs=2, num_minibatches=2)
    if size == "tiny":
        # All weights, as in the paper: with an adapter the tiny model learned little of what the quantiles mean.
        config.quark.update(
            train="full", batch_size=64, num_completions=4, num_minibatches=4, rollout_epochs=4
        )
        config.quark.optimizer.learning_rate = 2e-3
    return config
