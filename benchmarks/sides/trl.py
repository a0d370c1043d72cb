"""The torch peers: transformers' generate, and TRL's SFT, DPO, GRPO and PPO trainers on PEFT adapters or whole weights.

Settings are TRL's own but for what the workload fixes, and without activation checkpointing, which would only cost it
time. PPO needs trl 1.12, the last that has it."""

import re
import tempfile

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig

from benchmarks import workloads as w
from benchmarks.sides.protocol import Gate, forever, probe, serve


def build(workload: w.Workload, model_dir: str, gate: Gate):
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = load(model_dir)
    ids = torch.tensor(probe(workload.model.vocab_size))
    with torch.no_grad():
        logits = torch.log_softmax(model(ids).logits[:, :-1].float(), -1)
    logprobs = logits.gather(-1, ids[:, 1:, None])[..., 0].tolist()
    if workload.kind == "sample":
        return logprobs, forever(gate, sampler(workload, model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    make = {"sft": sft, "dpo": dpo, "grpo": grpo, "ppo": ppo}[workload.kind]
    return logprobs, lambda: make(workload, model, model_dir, tokenizer, gate).train()


def load(model_dir, kind=transformers.AutoModelForCausalLM, **more):
    return kind.from_pretrained(model_dir, dtype=torch.float32, **more)


def sampler(workload, model):
    prompts = torch.tensor([ids for ids, _ in w.rows(workload, workload.rows)])
    length = dict(min_new_tokens=workload.completion, max_new_tokens=workload.completion)
    settings = transformers.GenerationConfig(
        do_sample=True,
        temperature=w.TEMPERATURE,
        top_k=0,
        pad_token_id=w.PAD_ID,
        eos_token_id=w.EOS_ID,
        **length,
    )

    def one():
        with torch.no_grad():
            model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=settings)

    return one


class Held(transformers.TrainerCallback):
    """At the gate before each step. ppo: TRL's loop of PPO tells only where one ends and where all begin."""

    def __init__(self, gate, ppo=False):
        self.gate, self.ppo = gate, ppo

    def on_step_begin(self, *_, **__):
        if not self.ppo:
            self.gate()

    def on_train_begin(self, *_, **__):
        if self.ppo:
            self.gate()

    def on_step_end(self, *_, **__):
        if self.ppo:
            self.gate()


def settings(workload, **more):
    """What the configs of all its trainers have."""
    return dict(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=workload.sequences,
        gradient_checkpointing=False,
        learning_rate=w.LEARNING_RATE,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **more,
    )


def lora(workload, task="CAUSAL_LM"):
    if not workload.lora:
        return None
    return LoraConfig(r=w.LORA_RANK, lora_alpha=2 * w.LORA_RANK, target_modules="all-linear", task_type=task)


def examples(workload, count=64):
    return list(w.rows(workload, count * workload.rows))


def sft(workload, model, model_dir, tokenizer, gate):
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"text": w.text(ids + made[0])} for ids, made in examples(workload)])
    config = SFTConfig(**settings(workload, max_steps=64, max_length=None))
    return SFTTrainer(
        model,
        config,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora(workload),
        callbacks=[Held(gate)],
    )


def dpo(workload, model, model_dir, tokenizer, gate):
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": w.text(ids), "chosen": " " + w.text(made[0]), "rejected": " " + w.text(made[1])}
        for ids, made in examples(workload)
    ]
    fields = settings(workload, max_steps=64, max_length=None, beta=0.1)
    fields["per_device_train_batch_size"] = workload.rows  # pairs
    return DPOTrainer(
        model, None, DPOConfig(**fields), train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=lora(workload), callbacks=[Held(gate)],
    )  # fmt: skip


def grpo(workload, model, model_dir, tokenizer, gate):
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions, **_):
        return [float(bool(re.search(w.REWARDED, one))) for one in completions]

    config = GRPOConfig(
        **settings(workload, max_steps=64),
        num_generations=workload.completions,
        max_completion_length=workload.completion,
        temperature=w.TEMPERATURE,
        top_k=0,
        beta=w.KL["grpo"],
        generation_kwargs={"min_new_tokens": workload.completion},
    )
    data = Dataset.from_list([{"prompt": w.text(ids)} for ids, _ in examples(workload)])
    return GRPOTrainer(
        model, reward, config, train_dataset=data, processing_class=tokenizer, peft_config=lora(workload),
        callbacks=[Held(gate)],
    )  # fmt: skip


def ppo(workload, model, model_dir, tokenizer, gate):
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    one = dict(kind=transformers.AutoModelForSequenceClassification, num_labels=1)
    config = PPOConfig(
        **settings(workload, total_episodes=64 * workload.rows),
        num_ppo_epochs=workload.epochs,
        num_mini_batches=1,
        local_rollout_forward_batch_size=workload.rows,
        response_length=workload.completion,
        temperature=w.TEMPERATURE,
        kl_coef=w.KL["ppo"],
        num_sample_generations=0,
    )
    data = Dataset.from_list([{"input_ids": ids} for ids, _ in examples(workload)])
    return PPOTrainer(
        args=config, processing_class=tokenizer, model=model, ref_model=None if workload.lora else load(model_dir),
        reward_model=load(model_dir, **one), value_model=load(model_dir, **one), train_dataset=data,
        eval_dataset=data.select(range(workload.rows)), peft_config=lora(workload), callbacks=[Held(gate, ppo=True)],
    )  # fmt: skip


if __name__ == "__main__":
    serve(build)
