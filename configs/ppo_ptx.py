"""PPO with a supervised gradient mixed in, so that what the reward does not ask for is not forgotten.

python -m experiments.run --config=configs/ppo_ptx.py:tiny --workdir=out
InstructGPT: Ouyang et al. 2022, arXiv:2203.02155, eq. 2. Data: --config.data.ptx=FILE, as for configs/sft.py."""

from configs import common


def get_config(size="tiny"):
    config = common.get_config(size)
    common.instead_of(
        config,
        "ppo",
        "ppo_ptx",
        tuple(config.ppo),
        ptx_coeff=0.2,  # reward units a nat of the examples' cross-entropy a token; InstructGPT: 27.8
        ptx_batch_size=16,  # examples an update, fresh for each
    )
    config.data.ptx = ""  # empty: for tiny, what its base was taught
    config.stages = (*common.first_stages(size), "reward_model", "gate", "ppo_ptx", "evaluation")
    return config
