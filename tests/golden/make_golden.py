"""Makes the golden files of this folder. Run by hand in an environment with torch, transformers 5, peft and gguf:

    python tests/golden/make_golden.py make                     writes llama2/, llama3/, adapter/ and *.npz here
    python tests/golden/make_golden.py smollm2 FILE.gguf        writes smollm2.npz from transformers' own load
    python tests/golden/make_golden.py compare DIRECTORY        see `compare`: checks what our code has exported

Every number comes from torch and transformers in float32 on one thread; nothing of rlhf_jax is imported. The tests
read the files and need none of this."""

import json
import os
import shutil
import sys

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
NEW_TOKENS, STEPS, PAD = 12, 5, 0
# llama2: all heads have keys of their own, untied head, config as on the hub, old inv_freq buffers, two shards.
LLAMA2 = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    initializer_range=0.25,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
# llama3: two query heads a key head, biases, tied head, rotary frequencies scaled, config of transformers 5.
LLAMA3 = LLAMA2 | dict(
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    attention_bias=True,
    mlp_bias=True,
    eos_token_id=[2, 3],
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
)


def make():
    torch.manual_seed(0)
    llama2 = checkpoint("llama2", LLAMA2)
    as_on_the_hub(os.path.join(HERE, "llama2"), llama2)
    llama3 = checkpoint("llama3", LLAMA3)
    for name, model in (("llama2", llama2), ("llama3", llama3)):
        np.savez_compressed(os.path.join(HERE, f"{name}.npz"), **answers(model))
    adapter(llama2)
    np.savez_compressed(os.path.join(HERE, "sft.npz"), **sft(reload("llama2")))
    np.savez_compressed(os.path.join(HERE, "reward_model.npz"), **reward_model(reload("llama2")))


def checkpoint(name, settings):
    directory = os.path.join(HERE, name)
    shutil.rmtree(directory, ignore_errors=True)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" in key or key.endswith("bias"):  # ones and zeros would hide a mistake
                weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(directory, max_shard_size="30KB" if name == "llama2" else "5GB")
    return reload(name)


def as_on_the_hub(directory, model):
    """The config layout of the published Llama 2 files, and the rotary buffers that old conversions carry."""
    from safetensors.torch import save_file

    path = os.path.join(directory, "config.json")
    raw = json.load(open(path))
    del raw["rope_parameters"]
    raw["torch_dtype"] = raw.pop("dtype")
    raw |= {
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "transformers_version": "4.31.0",
        "pretraining_tp": 1,
    }
    json.dump(raw, open(path, "w"), indent=2)
    index_path = os.path.join(directory, "model.safetensors.index.json")
    index = json.load(open(index_path))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    file = sorted(index["weight_map"].values())[0]
    tensors = load_file(os.path.join(directory, file))
    tensors[name] = model.model.rotary_emb.inv_freq.clone()
    save_file(tensors, os.path.join(directory, file), metadata={"format": "pt"})
    index["weight_map"][name] = file
    json.dump(index, open(index_path, "w"), indent=2)


def reload(name):
    return LlamaForCausalLM.from_pretrained(os.path.join(HERE, name), dtype=torch.float32).eval()


def padded(lengths, width, side, generator):
    """Random ids [B, width] and their mask; ids under the mask are random too, since nothing may read them."""
    ids = torch.randint(4, LLAMA2["vocab_size"], (len(lengths), width), generator=generator)
    slot = torch.arange(width)[None]
    length = torch.tensor(lengths)[:, None]
    mask = (slot < length) if side == "right" else (slot >= width - length)
    return ids, mask.long()


def answers(model):
    """Logits with padding on each side, and greedy continuations of left-padded prompts."""
    generator = torch.Generator().manual_seed(1)
    out = {}
    with torch.no_grad():
        for side in ("left", "right"):
            ids, mask = padded([40, 23, 1], 40, side, generator)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
            out |= {f"{side}_ids": ids, f"{side}_mask": mask, f"{side}_logits": logits * mask[..., None]}
    # Prompts whose every choice is clear, so that rounding cannot turn one, and none an end token.
    prompts = [clear_prompt(model, length, generator) for length in (20, 9, 14, 3)]
    width = max(len(prompt) for prompt, _ in prompts)
    padding = [(width - len(prompt), 0) for prompt, _ in prompts]
    pad = torch.nn.functional.pad
    out |= {
        "prompt_ids": torch.stack([pad(p, w, value=PAD) for (p, _), w in zip(prompts, padding, strict=True)]),
        "prompt_mask": torch.stack([pad(p * 0 + 1, w) for (p, _), w in zip(prompts, padding, strict=True)]),
        "greedy_ids": torch.stack([greedy for _, greedy in prompts]),
    }
    return as_numpy(out)


def clear_prompt(model, length, generator):
    """(a random prompt, the NEW_TOKENS most likely next ones), each ahead of the second by at least 0.05 in logits."""
    while True:
        prompt = torch.randint(4, LLAMA2["vocab_size"], (length,), generator=generator)
        greedy, margin = continuation(model, prompt, NEW_TOKENS)
        if margin > 0.05 and greedy.min() > 3:
            return prompt, greedy


def continuation(model, prompt, steps):
    """(greedy ids, smallest lead of a chosen token in logits); no cache, no padding."""
    row, margin = prompt[None], float("inf")
    with torch.no_grad():
        for _ in range(steps):
            best = model(input_ids=row).logits[0, -1].topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            row = torch.cat([row, best.indices[:1][None]], dim=1)
    return row[0, len(prompt) :], margin


def adapter(model):
    from peft import LoraConfig, get_peft_model

    directory = os.path.join(HERE, "adapter")
    shutil.rmtree(directory, ignore_errors=True)
    settings = LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"v_proj": 2},
        alpha_pattern={"down_proj": 6},
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(reload("llama2"), settings).eval()
    with torch.no_grad():
        for key, weight in peft_model.named_parameters():
            if "lora_B" in key:
                weight.normal_(0.0, 0.2)
    peft_model.save_pretrained(directory)
    path = os.path.join(directory, "adapter_config.json")
    raw = json.load(open(path))
    raw["base_model_name_or_path"] = "llama2"
    raw["target_modules"] = sorted(raw["target_modules"])
    json.dump(raw, open(path, "w"), indent=2)
    os.remove(os.path.join(directory, "README.md"))
    ids, mask = padded([24, 11], 24, "left", torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = peft_model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)
        ).logits
        base = model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)
        ).logits
    print(f"adapter moves logits by up to {float((logits - base).abs().max()):.3f}")
    out = {"ids": ids, "mask": mask, "logits": logits * mask[..., None]}
    np.savez_compressed(os.path.join(HERE, "adapter.npz"), **as_numpy(out))


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def groups(generator, B, G, P, R, prompt_lengths, completion_lengths):
    """A batch as rlhf_jax lays it out: prompts padded on the left [B, P], completions on the right [B, G, R]."""
    prompt_ids, prompt_mask = padded(prompt_lengths, P, "left", generator)
    ids, mask = padded(completion_lengths, R, "right", generator)
    return prompt_ids, prompt_mask, ids.reshape(B, G, R), mask.reshape(B, G, R)


def rows_of(prompt_ids, prompt_mask, completion_ids, completion_mask):
    """[B*G, P+R] rows of prompt and completion: ids, mask and positions."""
    G = completion_ids.shape[1]
    ids = torch.cat([prompt_ids.repeat_interleave(G, 0), completion_ids.flatten(0, 1)], 1)
    mask = torch.cat([prompt_mask.repeat_interleave(G, 0), completion_mask.flatten(0, 1)], 1)
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def sft(model):
    """Mean cross-entropy over the completion tokens of the batch; the same batch at each of the steps."""
    batch = groups(torch.Generator().manual_seed(3), 4, 1, 10, 12, [10, 4, 7, 1], [12, 5, 9, 1])
    ids, mask, positions = rows_of(*batch)
    P, target_mask = batch[0].shape[1], batch[3].flatten(0, 1).float()
    optimizer, losses = adamw(model.parameters()), []
    for _ in range(STEPS):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        logprobs = logits[:, P - 1 : -1].log_softmax(-1).gather(-1, ids[:, P:, None])[..., 0]
        loss = -(logprobs * target_mask).sum() / target_mask.sum()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print("sft losses", losses)
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    return as_numpy(dict(zip(names, batch, strict=True)) | {"losses": torch.tensor(losses)})


def reward_model(model):
    """-log sigmoid(chosen - rejected), mean over pairs; candidate 0 is the chosen one of each prompt."""
    generator = torch.Generator().manual_seed(4)
    batch = groups(generator, 3, 2, 8, 10, [8, 3, 5], [10, 4, 7, 7, 1, 9])
    ids, mask, positions = rows_of(*batch)
    kernel = torch.nn.Parameter(torch.randn(LLAMA2["hidden_size"], generator=generator) * 0.3)
    initial = kernel.detach().clone()
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    backbone = model.model  # the vocabulary head takes no part
    optimizer, losses, first = adamw([*backbone.parameters(), kernel]), [], None
    for _ in range(STEPS):
        hidden = backbone(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
        scores = (hidden[torch.arange(len(ids)), last] @ kernel).reshape(batch[3].shape[:2])
        first = scores.detach().clone() if first is None else first
        loss = -torch.nn.functional.logsigmoid(scores[:, 0] - scores[:, 1]).mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print("reward model losses", losses)
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    out = {"head_kernel": initial, "first_scores": first, "losses": torch.tensor(losses)}
    return as_numpy(dict(zip(names, batch, strict=True)) | out)


def smollm2(path):
    """transformers' own dequantised load; prompts as text and as the ids of its tokenizer."""
    from transformers import AutoTokenizer

    directory, file = os.path.split(os.path.abspath(path))
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=file)
    prompts = ["The capital of France is", "I watched this film twice because the actors"]
    out = {"prompts": np.array(prompts)}
    for i, prompt in enumerate(prompts):
        ids = torch.tensor(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, -1]
        greedy, margin = continuation(model, ids, 16)
        out |= {
            f"ids_{i}": ids,
            f"logits_{i}": logits[:512],
            f"argmax_{i}": logits.argmax(),
            f"greedy_ids_{i}": greedy,
        }
        print(repr(prompt), "->", repr(tokenizer.decode(greedy)), f"smallest margin {margin:.4f}")
    np.savez_compressed(os.path.join(HERE, "smollm2.npz"), **as_numpy(out))


def compare(directory):
    """Exports of ours against transformers and peft.

    DIRECTORY/model is written by save_llama, DIRECTORY/adapter (optional) by save_adapter, and DIRECTORY/ours.npz holds
    ids, mask, logits and, with an adapter, adapter_logits as our code computes them.
    """
    ours = np.load(os.path.join(directory, "ours.npz"))
    ids, mask = torch.tensor(ours["ids"]).long(), torch.tensor(ours["mask"]).long()
    model = AutoModelForCausalLM.from_pretrained(os.path.join(directory, "model")).float().eval()
    call = dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))

    def difference(module, name):
        with torch.no_grad():
            logits = module(**call).logits.numpy()
        return np.abs((logits - ours[name]) * ours["mask"][..., None]).max()

    print(f"{directory}: model {difference(model, 'logits'):.2e}")
    if "adapter_logits" in ours:
        from peft import PeftModel

        peft_model = PeftModel.from_pretrained(model, os.path.join(directory, "adapter")).eval()
        print(f"{directory}: adapter {difference(peft_model, 'adapter_logits'):.2e}")


def as_numpy(tree):
    def plain(x):
        x = x.numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
        return x.astype(np.int32) if x.dtype == np.int64 else x

    return {name: plain(x) for name, x in tree.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, *arguments = sys.argv[1:] or ["help"]
    commands = {"make": make, "smollm2": smollm2, "compare": compare}
    if command not in commands:
        sys.exit(__doc__)
    commands[command](*arguments)
