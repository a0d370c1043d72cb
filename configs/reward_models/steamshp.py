"""SteamSHP: a T5 that is asked which of two responses is better, and answers with the token A or B.

Size tiny trains a T5 of random weights, whose position biases begin wide enough to tell the two apart: 0.773 of 128
held-out pairs are right after 320 steps (seed 0; label noise allows 0.861).

python -m experiments.run --config=configs/reward_models/steamshp.py:tiny --workdir=out
Ethayarajh et al. 2022, "Understanding Dataset Difficulty with V-Usable Information", arXiv:2110.08420. To start from:
--config.reward_model.backbone=google/flan-t5-large, at a rate of 1e-5. SteamSHP as it is published needs no stage:
name it as a reward, --config.rewards.components="('steamshp:path=stanfordnlp/SteamSHP-flan-t5-large',)"."""

from configs import reward_model


def get_config(size="tiny"):
    config = reward_model.get_config(size)
    config.reward_model.kind = "steamshp"
    if size == "tiny":  # to tell whose a word is takes longer than to tell good words from bad
        config.reward_model.steps = 320
    return config
