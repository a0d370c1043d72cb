"""PairRM: a DeBERTa that reads a prompt with two completions and says how much better the first is. A reward is the
mean advantage over the other completions of the prompt, so the policy needs two or more of each; its mean is 0 in every
group, and does not tell whether the policy gets better: evaluation compares it with the untuned one.

python -m experiments.run --config=configs/reward_models/pairrm.py:tiny --workdir=out
Jiang et al. 2023, "LLM-Blender", arXiv:2306.02561. To start from:
--config.reward_model.backbone=microsoft/deberta-v3-base (or llm-blender/PairRM-hf, to go on with it), at a rate of
1e-5. PairRM as it is published needs no stage: name it as a reward,
--config.rewards.components="('pairrm:path=llm-blender/PairRM-hf',)"."""

from configs import reward_model


def get_config(size="tiny"):
    config = reward_model.get_config(size)
    config.reward_model.kind = "pairrm"
    return config
