"""InstructGPT: Ouyang et al. 2022, "Training language models to follow instructions with human feedback",
arXiv:2203.02155: supervised fine-tuning, a reward model on comparisons, PPO with the gradient of pretraining mixed in.

Data: demonstrations (sft), rankings or their pairs (preferences), prompts, and plain text as in pretraining (ptx: rows
with `text`). Published: people prefer the 175B model to GPT-3 85% of the time, and the 1.3B one to GPT-3 175B. The
paper also averages weights over steps (EMA 0.992) and gives the value a rate of its own; neither is done here."""

from configs import ppo_ptx
from configs.recipes import epochs, published


def get_config(size="tiny"):
    config = ppo_ptx.get_config(size)
    config.sampling.temperature = 1.0
    config.ppo_ptx.update(
        kl_coeff=0.02,
        gamma=1.0,
        clip_epsilon=0.2,
        value="reward",  # the critic starts as the reward model
        ptx_coeff=27.8,
        rollout_epochs=1,
        num_minibatches=8,
    )
    if published(
        config,
        size,
        "sft",
        "reward_model",
        "ppo_ptx",
        sft="data/instruct/demonstrations.jsonl",
        prompts="data/instruct/prompts.jsonl",
        preferences="data/instruct/comparisons.jsonl",
        ptx="data/instruct/pretraining.jsonl",
        prompt_tokens=1024,
        completion_tokens=1024,
    ):
        config.sft.update(train="full", **epochs(13_000, 16, 32))
        config.sft.optimizer.update(learning_rate=9.65e-6, schedule="cosine")
        config.reward_model.update(train="full", **epochs(33_000, 1, 64))
        config.reward_model.optimizer.update(learning_rate=9e-6, schedule="cosine")
        config.ppo_ptx.update(train="full", num_completions=1, **epochs(256_000, 1, 512))
        config.ppo_ptx.ptx_batch_size = 8 * 64  # eight examples for each episode of a minibatch
        config.ppo_ptx.optimizer.update(learning_rate=9e-6, schedule="constant", warmup_steps=80)
    else:
        config.ppo_ptx.ptx_batch_size = 16
    return config
