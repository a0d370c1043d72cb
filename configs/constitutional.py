"""Constitutional AI: the model criticises and rewrites its own answers; a judge takes the place of people.

Bai et al. 2022, arXiv:2212.08073.   --config=configs/constitutional.py:smollm2
At tiny the model can say nothing of sense: the stages run, and that is all."""

from configs import ppo


def get_config(size="tiny"):
    config = ppo.get_config(size)
    first = ("sft", "constitution") if size == "tiny" else ("constitution", "sft")
    config.stages = (*first, "preferences", "reward_model", "gate", "ppo", "evaluation")
    if size != "tiny":
        path = config.model.path
        config.preferences.labeller = f"judge:path={path},template=true"  # a second copy of the weights
    config.constitution = dict(
        principles="",  # rows critique, revision (JSONL, hub id, ...); empty: the seven packaged ones
        num_prompts=128,  # of the training prompts
        rounds=1,  # of criticism and rewriting, each by a principle drawn anew
        critique_tokens=48,
        batch_size=16,  # prompts
        template=size != "tiny",  # criticism and rewriting are asked for in the chat format of the tokenizer
    )
    return config
