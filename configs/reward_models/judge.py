"""A language model as the reward: which of two completions it prefers, from the logits of two labels, both orders.

Lee et al. 2023, "RLAIF", arXiv:2309.00267.   --config=configs/reward_models/judge.py:tiny
A completion's reward is the share of the others of its prompt that it beats, so the mean over a group is 0.5 whatever
the policy: look at the true reward, or read. At tiny the judge is the embedded SmolLM2, which reads text and so need
not share the policy's tokenizer."""

from configs import rloo


def get_config(size="tiny"):
    config = rloo.get_config(size)
    small = size in ("tiny", "smollm2")
    judge = "judge:path=smollm2,template=true" if small else f"judge:path={config.model.path},template=true"
    config.rewards.components = (judge,)
    config.stages = (*(("sft",) if size == "tiny" else ()), "rloo", "evaluation")
    if small:  # each completion is compared with each other one of its prompt, twice
        config.rloo.update(steps=12, batch_size=8, num_completions=2, num_minibatches=1)
        config.evaluation.update(batch_size=8, num_completions=2)
        config.data.held_out_prompts = 16
    return config
