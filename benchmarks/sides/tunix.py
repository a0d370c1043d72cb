"""Tunix's sampler, PEFT trainer, DPO trainer, and GRPO and PPO learners, on its own Llama.

Its defaults but for what the workload fixes; its loops run ahead of the device, so each iteration is waited for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from transformers import AutoTokenizer
from tunix.generate import sampler as samplers
from tunix.models.llama3 import model as models
from tunix.models.llama3 import params as loading
from tunix.rl import rl_cluster as clusters
from tunix.rl import utils as rl_utils
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.sft import peft_trainer
from tunix.sft import utils as sft_utils
from tunix.sft.dpo import dpo_trainer

from benchmarks import workloads as w
from benchmarks.sides.protocol import Gate, forever, probe, serve

ALL_LINEAR = ".*q_proj|.*k_proj|.*v_proj|.*o_proj|.*gate_proj|.*up_proj|.*down_proj"
MESH = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1), ("fsdp", "tp"))


class Llama(models.Llama3):
    """Its scores and values hand every model `segment_ids`, which its own Llama (0.1.7) does not take."""

    def __call__(self, *args, segment_ids=None, **kwargs):
        return super().__call__(*args, **kwargs)


models.Llama3 = Llama


def build(workload: w.Workload, model_dir: str, gate: Gate):
    with MESH:
        model = load(workload, model_dir)
        ids = jnp.asarray(probe(workload.model.vocab_size))
        mask = jnp.ones(ids.shape, bool)
        logits, _ = model(
            ids, sft_utils.build_positions_from_mask(mask), None, sft_utils.make_causal_attn_mask(mask)
        )
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], -1)[..., 0]
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        if workload.kind == "sample":
            return logprobs, forever(gate, sampler(workload, model, tokenizer))
        make = {"sft": sft, "dpo": dpo, "grpo": grpo, "ppo": ppo}[workload.kind]

    def loop():
        with MESH:
            make(workload, model, model_dir, tokenizer, gate)

    return logprobs, loop


def load(workload, model_dir):
    s = workload.model
    config = models.ModelConfig(
        num_layers=s.num_layers,
        vocab_size=s.vocab_size,
        embed_dim=s.hidden_size,
        hidden_dim=s.intermediate_size,
        num_heads=s.num_heads,
        head_dim=s.head_dim,
        num_kv_heads=s.num_kv_heads,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=s.tied,
    )
    return loading.create_model_from_safe_tensors(model_dir, config, MESH, dtype=jnp.float32)


def policy(workload, model):
    """The model, or a copy of it with adapters."""
    if not workload.lora:
        return model
    provider = qwix.LoraProvider(module_path=ALL_LINEAR, rank=w.LORA_RANK, alpha=2.0 * w.LORA_RANK)
    return qwix.apply_lora_to_model(model, provider, **model.get_model_input())


def texts(workload, seed=0):
    """Prompts without their first word: its sampler puts a begin token there."""
    return [w.text(ids[1:]) for ids, _ in w.rows(workload, workload.rows, seed)]


def sampler(workload, model, tokenizer):
    prompts = texts(workload)
    s, length = workload.model, workload.prompt + workload.completion
    cache = samplers.CacheConfig(length, s.num_layers, s.num_kv_heads, s.head_dim)
    sample = samplers.Sampler(model, tokenizer, cache)
    counter = iter(range(10**9))

    def one():
        sample(
            prompts, max_generation_steps=workload.completion, max_prompt_length=workload.prompt,
            temperature=w.TEMPERATURE, top_p=1.0, seed=next(counter), pad_output=True,
        )  # fmt: skip

    return one


def batches(workload, make, gate, waited):
    """make(examples of one step), at the gate before each, once what `waited` holds is there."""
    for n in range(64):
        jax.block_until_ready(nnx.state(waited))
        gate()
        yield make(list(w.rows(workload, workload.rows, seed=n)))


def adam():
    return optax.adamw(w.LEARNING_RATE)


def sft(workload, model, model_dir, tokenizer, gate):
    model = policy(workload, model)
    config = peft_trainer.TrainingConfig(eval_every_n_steps=10**6, max_steps=64)
    trainer = peft_trainer.PeftTrainer(model, adam(), config)

    def inputs(x):
        mask = x.input_tokens != w.PAD_ID
        return {
            "input_tokens": x.input_tokens,
            "input_mask": x.input_mask,
            "positions": sft_utils.build_positions_from_mask(mask),
            "attention_mask": sft_utils.make_causal_attn_mask(mask),
        }

    def make(examples):
        ids = np.array([[*ids, *made[0], w.EOS_ID] for ids, made in examples], np.int32)
        return peft_trainer.TrainingInput(input_tokens=ids, input_mask=np.ones(ids.shape, bool))

    trainer.with_gen_model_input_fn(inputs).train(batches(workload, make, gate, model))


def dpo(workload, model, model_dir, tokenizer, gate):
    tuned = policy(workload, model)
    config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**6, max_steps=64, beta=0.1)
    trainer = dpo_trainer.DPOTrainer(tuned, model, adam(), config)

    def make(examples):
        prompts = np.array([ids for ids, _ in examples], np.int32)
        made = [np.array([[*made[side], w.EOS_ID] for _, made in examples], np.int32) for side in (0, 1)]
        ones = [np.ones(x.shape, np.int32) for x in (prompts, *made)]
        return dpo_trainer.TrainingInput(prompts, ones[0], made[0], ones[1], made[1], ones[2])

    trainer.train(batches(workload, make, gate, tuned))


def cluster(workload, model, tokenizer, **more):
    rows = workload.rows
    training = clusters.RLTrainingConfig(
        actor_optimizer=adam(),
        critic_optimizer=adam() if "critic" in more else None,
        eval_every_n_steps=10**6,
        max_steps=64 * workload.epochs,
        mini_batch_size=rows,
        train_micro_batch_size=rows,
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=workload.completion,
        max_prompt_length=workload.prompt,
        kv_cache_size=workload.prompt + workload.completion,
        temperature=w.TEMPERATURE,
        top_p=1.0,
        top_k=None,
    )
    roles = dict.fromkeys(clusters.Role, MESH)
    config = clusters.ClusterConfig(role_to_mesh=roles, training_config=training, rollout_config=rollout)
    return clusters.RLCluster(tokenizer=tokenizer, cluster_config=config, **more)


def held(workload, learner, trained, gate):
    """Its training, at the gate before each global step."""
    step = learner._run_global_step

    def waiting(*args):
        jax.block_until_ready(nnx.state(trained))
        gate()
        step(*args)

    learner._run_global_step = waiting
    learner.train([{"prompts": np.array(texts(workload, n))} for n in range(64)])


def reward(prompts, completions, **_):
    return [float(bool(re.search(w.REWARDED, one))) for one in completions]


def grpo(workload, model, model_dir, tokenizer, gate):
    tuned = policy(workload, model)
    made = cluster(workload, model, tokenizer, actor=tuned, reference=model)
    config = GRPOConfig(num_generations=workload.completions, num_iterations=1, beta=w.KL["grpo"])
    held(workload, GRPOLearner(made, config, reward), made.actor_trainer.model, gate)


def ppo(workload, model, model_dir, tokenizer, gate):
    if workload.lora:
        raise ValueError("ppo with adapters: Tunix has no critic beside them; benchmarks.peers leaves it out")
    reference = load(workload, model_dir)
    critic, judge = (rl_utils.create_critic_model(model, seed) for seed in (0, 1))
    made = cluster(workload, model, tokenizer, actor=model, reference=reference, critic=critic, reward=judge)
    config = PPOConfig(num_iterations=workload.epochs, beta=w.KL["ppo"])
    held(workload, PPOLearner(made, config), made.actor_trainer.model, gate)


if __name__ == "__main__":
    serve(build)
