"""DAPO: Yu et al. 2025, "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv:2503.14476.

Clip-higher, a mean over tokens, groups of equal rewards drawn again, a soft penalty in tokens for answers that run into
the limit, and no KL. It needs a base whose context holds 22,529 tokens (--config.model.path).
Data: questions with their answers (prompts): the English part of BytedTsinghua-SIA/DAPO-Math-17k, each once.
Published: AIME 2024 50% with Qwen2.5-32B, half the steps of DeepSeek-R1-Zero's 47%."""

from configs import grpo
from configs.recipes import published


def get_config(size="tiny"):
    config = grpo.get_config(size)
    config.stages = tuple(stage for stage in config.stages if stage not in ("preferences", "reward_model"))
    config.rewards.components = ("sentiment",)
    config.grpo.update(
        loss_type="dapo",
        advantage_scale="group",
        clip_low=0.2,
        clip_high=0.28,
        kl_loss_coeff=0.0,
        max_refills=2,
        overlong_buffer_tokens=4,
        overlong_penalty=1.0,
        rollout_epochs=1,
    )
    if published(
        config,
        size,
        "grpo",
        prompts="open-r1/DAPO-Math-17k-Processed:en",
        prompt_tokens=2048,
        completion_tokens=20480,
    ):
        config.rewards.update(
            components=("math",), weights=(2.0,)
        )  # the paper's 1 and -1, but for a constant
        config.grpo.update(
            train="full",
            batch_size=512,
            num_completions=16,
            num_minibatches=16,
            num_microbatches=8,
            steps=1_000,  # ours
            overlong_buffer_tokens=4096,
        )
        config.grpo.optimizer.update(learning_rate=1e-6, schedule="constant", warmup_steps=20 * 16)
    return config
