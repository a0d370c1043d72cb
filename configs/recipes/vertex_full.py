"""The full run of the course on Vertex AI's RLHF: all of its data, 10,000 steps each, a fifth of the usual rate in RL.

Data as in vertex_small.py. Published for Llama-2-7B: reward from -4 to 19.5 and KL from 0.02 to 57 nats; the last 7,000
steps of reinforcement buy one unit of reward for ten to forty nats."""

from configs.recipes.vertex_small import course_run


def get_config(size="tiny"):
    return course_run(
        size,
        reward_model_train_steps=10_000,
        reinforcement_learning_train_steps=10_000,
        reinforcement_learning_rate_multiplier=0.2,
    )
