"""One config a kind of reward model: configs/reward_model.py with the kind set."""
