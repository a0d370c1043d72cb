"""StackLLaMA: Beeching et al. 2023, "StackLLaMA: A hands-on guide to train LLaMA with RLHF" (Hugging Face).

LoRA throughout: packed supervised fine-tuning on StackExchange answers, a reward model on pairs of answers by their
score (round(log2(1 + upvotes)), one more if accepted, -1 if negative), PPO against it.
Data: questions with answers (sft); questions whose answers have scores, of which pairs are made, at most ten each
(preferences), and other questions (prompts): parts of HuggingFaceH4/stack-exchange-preferences, 22 GB.
Published: reward model accuracy 67% after 100,000 pairs; the mean reward rises through PPO."""

from configs import ppo
from configs.recipes import epochs, published


def get_config(size="tiny"):
    config = ppo.get_config(size)
    config.lora.update(rank=16, alpha=32.0, targets="attention")
    config.sft.packed_tokens = 32 if size == "tiny" else 1024
    config.ppo.update(
        kl_coeff=0.2,
        kl_control="adaptive",
        kl_target=6.0,
        stop_approx_kl=0.1,
        rollout_epochs=4,
        num_minibatches=1,
    )
    if published(
        config,
        size,
        "sft",
        "reward_model",
        "ppo",
        sft="data/stackexchange/sft.jsonl",
        prompts="HuggingFaceH4/stack-exchange-preferences#train[50000:150000]",
        preferences="HuggingFaceH4/stack-exchange-preferences#train[:50000]",
        prompt_tokens=512,
        completion_tokens=128,
    ):
        config.sft.update(steps=10_000, batch_size=32)
        config.sft.optimizer.update(
            learning_rate=1e-5, schedule="cosine", warmup_steps=100, weight_decay=0.05
        )
        config.reward_model.update(**epochs(100_000, 1, 32))
        config.reward_model.optimizer.update(learning_rate=2e-5, schedule="linear", warmup_steps=0)
        config.ppo.update(num_completions=1, batch_size=256, steps=1_000)  # steps: ours
        config.ppo.optimizer.update(learning_rate=1.4e-5, schedule="constant", warmup_steps=0)
    return config
