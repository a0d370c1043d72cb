"""The small run of the course on Vertex AI's RLHF: 3,000 preferences and 2,000 prompts, 30 and 10 times.

Data: Reddit posts in Vertex's JSONL (prompts, preferences, eval prompts). The published run of Llama-2-7B is a warning:
the reward model's rank_loss goes from 0.63 to 0.003, so it knows its pairs by heart, and the reward stands at 19 from
the first steps of reinforcement to the last."""

from configs import pipeline, vertex

REFERENCES = {"llama2_7b": "llama-2-7b", "llama2_13b": "llama-2-13b"}


def course_run(size, **parameters):
    """The pipeline with parameters of Vertex AI's own names; at tiny, its kl_coeff on what tiny makes."""
    if size == "tiny":
        config = pipeline.get_config(size)
        config.ppo.kl_coeff = vertex.DEFAULTS["kl_coeff"]
        return config
    if size not in REFERENCES:
        raise ValueError(
            f"the size is {size!r}; the course's models are {', '.join(REFERENCES)}, and tiny is ours"
        )
    data = {f"{name}_dataset": f"data/reddit/{name}.jsonl" for name in ("preference", "prompt", "eval")}
    fixed = dict(
        large_model_reference=REFERENCES[size],
        instruction="Summarize in less than 50 words.",
        prompt_sequence_length=512,
        target_sequence_length=64,
        kl_coeff=0.1,
    )
    return vertex.get_config(data | fixed | parameters)


def get_config(size="tiny"):
    return course_run(
        size,
        reward_model_train_steps=vertex.steps_from_epochs(3_000, 30),
        reinforcement_learning_train_steps=vertex.steps_from_epochs(2_000, 10),
    )
