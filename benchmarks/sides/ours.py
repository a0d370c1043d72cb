"""Our side: the stages of `experiments.run` themselves, held at the gate between two steps of the one loop."""

import importlib
import json
import os
import tempfile

import jax
import jax.numpy as jnp

from benchmarks import workloads as w
from benchmarks.sides.protocol import Gate, forever, probe, serve
from rlhf_jax.checkpoints import huggingface
from rlhf_jax.checkpoints import roles as role_files
from rlhf_jax.data.tokenization import load_tokenizer
from rlhf_jax.losses.logprobs import token_logprobs
from rlhf_jax.models import heads
from rlhf_jax.models.llama import Llama
from rlhf_jax.models.roles import Role
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.training import offline, online, stages
from rlhf_jax.training.console import Console
from rlhf_jax.training.loop import StopRequest
from rlhf_jax.training.run import Run


def build(workload: w.Workload, model_dir: str, gate: Gate):
    config, params = huggingface.load_llama(model_dir)
    ids = jnp.asarray(probe(config.vocab_size))
    logits = jax.jit(lambda p, i: Llama(config).apply({"params": p}, i, jnp.ones_like(i)))(params, ids)
    logprobs = token_logprobs(logits[:, :-1], ids[:, 1:])
    if workload.kind == "sample":
        return logprobs, forever(gate, sampler(workload, Llama(config), params))
    del params, logits
    return logprobs, lambda: train(workload, model_dir, gate)


def sampler(workload, model, params):
    prompts = jnp.asarray([ids for ids, _ in w.rows(workload, workload.rows)])
    settings = SamplingConfig(
        workload.completion, w.TEMPERATURE, eos_ids=(w.EOS_ID,), min_new_tokens=workload.completion
    )

    keys = iter(jax.random.split(jax.random.key(0), 1000))

    def one():
        jax.block_until_ready(generate(model, params, prompts, jnp.ones_like(prompts), next(keys), settings))

    return one


def train(workload, model_dir, gate):
    """The stage, whose loop is held before each step until the step before is done on the device."""
    folder = tempfile.mkdtemp()
    config = configured(workload, model_dir, folder)
    if workload.kind == "ppo":
        save_reward_model(model_dir, os.path.join(folder, "roles", "reward_model"))

    def held(stage, state, step_fn, **_):
        position = 0
        while True:
            gate()
            state, output = step_fn(state, position)
            jax.block_until_ready((state, output.metrics))
            output.finish()
            position += 1

    online.train = offline.train = held
    with StopRequest() as stop:
        run = Run(config, folder, Console(quiet=True), stop)
        stages.STAGES[workload.kind](run)


def configured(workload, model_dir, folder):
    kind, steps = workload.kind, 64
    config = importlib.import_module(f"configs.{kind}").get_config("tiny")
    written = {"prompts": os.path.join(folder, "prompts.jsonl"), kind: os.path.join(folder, f"{kind}.jsonl")}
    with open(written["prompts"], "w") as prompts, open(written[kind], "w") as groups:
        for ids, completions in w.rows(workload, 2 * steps * workload.rows):
            texts = [w.text(one) for one in completions]
            prompts.write(json.dumps({"input_text": w.text(ids)}) + "\n")
            row = {"input_text": w.text(ids), "output_text": texts[0]}
            if kind == "dpo":
                row = {"prompt": w.text(ids), "chosen": texts[0], "rejected": texts[1]}
            groups.write(json.dumps(row) + "\n")
    config.model.path = model_dir
    config.data.update(prompt_tokens=workload.prompt, completion_tokens=workload.completion)
    config.data.update(prompts=written["prompts"], held_out_prompts=0, held_out_pairs=0)
    config.sampling.min_new_tokens = workload.completion
    config.stages = (kind,)
    section = config[kind]
    section.update(steps=steps, batch_size=workload.rows, train="lora" if workload.lora else "full")
    section.optimizer.learning_rate = w.LEARNING_RATE
    config.lora.rank = w.LORA_RANK
    if kind == "sft":
        config.data.sft = written["sft"]
    if kind == "dpo":
        config.data.preferences = written["dpo"]
    if kind in w.KL:
        section.num_completions = workload.completions
        section.update(rollout_epochs=workload.epochs, num_minibatches=1, num_microbatches=1)
    if kind == "grpo":
        section.kl_loss_coeff = w.KL["grpo"]
        config.rewards.components = (f"regex:pattern={w.REWARDED}",)
    if kind == "ppo":
        section.update(kl_coeff=w.KL["ppo"], reward_reference_batches=1)
    return config


def save_reward_model(model_dir, path):
    """A head on the base as it is: what is timed is its forward pass."""
    config, _ = huggingface.load_llama(model_dir)
    role = Role(head=heads.init_reward(jax.random.key(1), config.hidden_size))
    tokenizer = load_tokenizer(model_dir, config.eos_ids).tokenizer
    role_files.save_role(path, role, config, None, tokenizer, {"kind": "pairwise"})


if __name__ == "__main__":
    serve(build)
