"""DeepSeekMath: Shao et al. 2024, "Pushing the Limits of Mathematical Reasoning in Open Language Models",
arXiv:2402.03300: GRPO, 64 answers a question, one update a rollout.

Data: questions with the field `answer` (prompts); the paper's are 144,000 of GSM8K and MATH, of which openai/gsm8k:main
has 7,473 and is read as it is. Its reward is a model that is not public; here an answer is right or wrong (math-verify:
pip install 'rlhf_jax[math]').
Published: GSM8K 82.9 to 88.2%, MATH 46.8 to 51.7% for 7B."""

from configs import grpo
from configs.recipes import epochs, published


def get_config(size="tiny"):
    config = grpo.get_config(size)
    config.stages = tuple(stage for stage in config.stages if stage not in ("preferences", "reward_model"))
    config.rewards.components = ("sentiment",)
    config.grpo.update(
        loss_type="grpo",
        advantage_scale="group",
        clip_low=0.2,
        clip_high=0.2,
        kl_loss_coeff=0.04,
        kl_loss_kind="k3",
        rollout_epochs=1,
        num_minibatches=1,
    )
    if published(
        config, size, "grpo", prompts="data/math/questions.jsonl", prompt_tokens=512, completion_tokens=1024
    ):
        config.rewards.components = ("math",)
        config.grpo.update(train="full", num_completions=64, num_microbatches=16, **epochs(144_000, 1, 16))
        config.grpo.optimizer.update(learning_rate=1e-6, schedule="constant", warmup_steps=0)
    return config
