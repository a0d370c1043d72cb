"""The parameters of the Vertex AI RLHF pipeline as a config of ours.   python -m experiments.vertex --help

Names, defaults and limits are that pipeline's; batch size 64 and the constant learning rates (reward model 1e-4,
reinforcement 5e-4, each times its multiplier) are what it fixes inside."""

from configs import pipeline
from rlhf_jax.data.batching import steps_for_epochs

BATCH_SIZE = 64
SIZES = {"llama-2-7b": "llama2_7b", "llama-2-13b": "llama2_13b",
         "llama-2-7b-chat": "llama2_7b", "llama-2-13b-chat": "llama2_13b"}  # fmt: skip
REQUIRED = ("preference_dataset", "prompt_dataset", "large_model_reference")
DEFAULTS = {
    "eval_dataset": "",
    "instruction": "",
    "prompt_sequence_length": 512,
    "target_sequence_length": 64,
    "reward_model_learning_rate_multiplier": 1.0,
    "reinforcement_learning_rate_multiplier": 1.0,
    "reward_model_train_steps": 1000,
    "reinforcement_learning_train_steps": 1000,
    "kl_coeff": 0.1,
}
# Of the cloud service: read, so that a file written for it works as it is, and without effect here.
CLOUD_ONLY = ("model_display_name", "tensorboard_resource_id", "deploy_model", "project", "location")


def steps_from_epochs(num_examples: int, epochs: float) -> int:
    """Steps that show every example `epochs` times at the pipeline's batch size, rounded up once at the end."""
    return steps_for_epochs(num_examples, epochs, BATCH_SIZE)


def get_config(parameters: dict):
    """From checked parameters (experiments/vertex.py checks them)."""
    p = DEFAULTS | parameters
    size = SIZES.get(p["large_model_reference"])
    # Any other checkpoint starts from the small settings in float32; for a TPU override dtype and remat.
    config = pipeline.get_config(size or "smollm2")
    config.model.path = p["large_model_reference"]
    config.mesh.update(data=1, fsdp=-1, tensor=1)
    config.gold = ""
    config.stages = ("reward_model", "gate", "ppo") + (("evaluation",) if p["eval_dataset"] else ())
    config.data.update(
        preferences=p["preference_dataset"],
        prompts=p["prompt_dataset"],
        eval_prompts=p["eval_dataset"],
        instruction=p["instruction"],
        prompt_tokens=p["prompt_sequence_length"],
        completion_tokens=p["target_sequence_length"],
        held_out_prompts=0,
    )
    fixed = {"schedule": "constant", "warmup_steps": 0, "head_multiplier": 1.0}
    config.reward_model.update(
        steps=p["reward_model_train_steps"], batch_size=BATCH_SIZE, layers=0, pooling="last", center_coeff=0.0
    )
    config.reward_model.optimizer.update(
        learning_rate=1e-4 * p["reward_model_learning_rate_multiplier"], **fixed
    )
    config.ppo.update(
        steps=p["reinforcement_learning_train_steps"],
        batch_size=BATCH_SIZE,
        num_completions=1,
        kl_coeff=float(p["kl_coeff"]),
    )
    config.ppo.optimizer.update(learning_rate=5e-4 * p["reinforcement_learning_rate_multiplier"], **fixed)
    config.evaluation.update(num_completions=1, temperature=0.0)  # the bulk inferrer is greedy
    config.logging.tags.reward_model = {"loss": "rank_loss", "learning_rate": "learning_rate"}
    config.logging.tags.ppo = {
        "reward": "reward", "kl": "kl_loss", "loss": "rl_loss", "learning_rate": "learning_rate",
    }  # fmt: skip
    return config
