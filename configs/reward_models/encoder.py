"""A reward model that is an encoder with a tokenizer of its own: prompt and completion in one sequence, one score.

python -m experiments.run --config=configs/reward_models/encoder.py:tiny --workdir=out
Devlin et al. 2019, arXiv:1810.04805; DeBERTa-v3, He et al. 2021, arXiv:2111.09543. To start from:
--config.reward_model.backbone=microsoft/deberta-v3-base (or a BERT, a RoBERTa), at a rate of 1e-5; its objective is
pairwise, classification or regression. One that is trained already needs no stage: name it as a reward,
--config.rewards.components="('encoder:path=OpenAssistant/reward-model-deberta-v3-large-v2',)"."""

from configs import reward_model


def get_config(size="tiny"):
    config = reward_model.get_config(size)
    config.reward_model.kind = "encoder"
    return config
