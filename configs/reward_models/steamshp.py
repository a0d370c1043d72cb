"""SteamSHP: a T5 that is asked which of two responses is better, and answers with the token A or B.

The self-made T5 of size tiny shows that everything runs. To compare two texts a T5 has to be pretrained: after 192
steps from random weights it is right in 58 percent of 128 held-out pairs, and the gate says so.

python -m experiments.run --config=configs/reward_models/steamshp.py:tiny --workdir=out
Ethayarajh et al. 2022, "Understanding Dataset Difficulty with V-Usable Information", arXiv:2110.08420. To start from:
--config.reward_model.backbone=google/flan-t5-large, at a rate of 1e-5. SteamSHP as it is published needs no stage:
name it as a reward, --config.rewards.components="('steamshp:path=stanfordnlp/SteamSHP-flan-t5-large',)"."""

from configs import reward_model


def get_config(size="tiny"):
    config = reward_model.get_config(size)
    config.reward_model.kind = "steamshp"
    return config
