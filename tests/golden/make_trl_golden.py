"""Makes trl_losses.npz and dpo.npz. Run by hand in an environment with torch, transformers 5 and trl 1.16:

    python tests/golden/make_trl_golden.py

The losses are TRL's own: `_compute_loss` of its DPO and GRPO trainers, handed log-probabilities in the place of a
model's. The trajectory is plain torch. Nothing of rlhf_jax is imported; the tests read the files and need none of
this."""

import collections
import os
import types

import numpy as np
import torch
from make_golden import HERE, STEPS, adamw, as_numpy, groups, reload, rows_of
from trl import DPOTrainer, GRPOTrainer

B, T, PAIRS = 8, 7, 6
EPSILON = 0.1  # label smoothing
DIVERGENCES = {"forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence"}


class Given(torch.nn.Module):
    """In the place of a model: log-probabilities that are given."""

    is_gradient_checkpointing = False

    def __init__(self, logprobs, collision=None):
        super().__init__()
        nothing = torch.zeros_like(logprobs)
        self.outputs = types.SimpleNamespace(
            log_probs=logprobs,
            log_sum_sq_probs=collision,
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
        )

    def forward(self, **inputs):
        return self.outputs


def trainer(model, **settings):
    """What `_compute_loss` reads of a trainer."""
    accelerator = types.SimpleNamespace(
        device="cpu",
        num_processes=1,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    metrics = collections.defaultdict(lambda: collections.defaultdict(list))
    common = dict(accelerator=accelerator, model=model, aux_loss_enabled=False, _metrics=metrics)
    return types.SimpleNamespace(**(common | settings))


def lengths_to_mask(lengths):
    return np.int32(np.arange(T) < np.array(lengths)[:, None])


def dpo_losses():
    """Rows 0 .. PAIRS - 1 are chosen, the others the rejected of the same pairs."""
    rng = np.random.default_rng(0)
    ragged = rng.integers(1, T + 1, 2 * PAIRS)
    even = np.concatenate(
        [np.full(PAIRS, 5), ragged[PAIRS:]]
    )  # TRL's sft is a mean over the tokens of all pairs
    draw = lambda spread: rng.gamma(1.0, spread, (2 * PAIRS, T))
    policy = -draw(0.9)
    arrays = {
        "policy": policy,
        "reference": policy + rng.normal(0, 0.5, policy.shape),
        "collision": -draw(0.02),
    }
    out = {f"dpo/{name}": np.float32(x) for name, x in arrays.items()}
    out |= {"dpo/mask": lengths_to_mask(ragged), "dpo/even_mask": lengths_to_mask(even)}

    def case(
        name,
        loss_types,
        weights=(1.0,),
        *,
        divergence="reverse_kl",
        alpha=0.5,
        tail=None,
        wpo=False,
        even=False,
    ):
        mask = torch.tensor(out["dpo/even_mask" if even else "dpo/mask"])
        leaf = torch.tensor(out["dpo/policy"], requires_grad=True)
        policy = Given(leaf * mask, torch.tensor(out["dpo/collision"]))
        me = trainer(
            policy,
            ref_model=Given(torch.tensor(out["dpo/reference"]) * mask),
            args=types.SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
            loss_types=loss_types.split(","),
            loss_weights=weights,
            beta=0.3,
            label_smoothing=EPSILON,
            f_divergence_type=divergence,
            f_alpha_divergence_coef=alpha,
            ld_alpha=tail,
            use_weighting=wpo,
            precompute_ref_logps=False,
            _total_train_tokens=0,
            _tp_size=1,
        )
        whole = torch.cat([torch.zeros(2 * PAIRS, 1, dtype=mask.dtype), mask], 1)  # a prompt of one token
        inputs = {"input_ids": torch.zeros_like(whole), "attention_mask": whole, "completion_mask": whole}
        loss = DPOTrainer._compute_loss(me, policy, inputs, False)
        loss.backward()
        out[f"dpo/{name}/loss"], out[f"dpo/{name}/gradient"] = loss.detach().numpy(), leaf.grad.numpy()

    for loss_type in (
        "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop "
        "sigmoid_norm"
    ).split():
        case(loss_type, loss_type)
    for ours, theirs in DIVERGENCES.items():
        for loss_type in ("sigmoid", "ipo", "sigmoid_norm"):
            case(f"{loss_type}:{ours}", loss_type, divergence=theirs)
    case("sigmoid,bco_pair,sft", "sigmoid,bco_pair,sft", (0.8, 0.2, 1.0), even=True)
    case("sigmoid,ipo", "sigmoid,ipo", (1.0, 0.5))
    case("hinge,aot,sigmoid_norm", "hinge,aot,sigmoid_norm", (0.8, 0.2, 0.5))
    case("hinge,sigmoid_norm:js", "hinge,sigmoid_norm", (0.8, 0.5), divergence="js_divergence")
    case("hinge+tail", "hinge", tail=0.4)
    case("hinge,apo_zero+tail", "hinge,apo_zero", (1.0, 0.5), tail=0.4)
    case("sigmoid+wpo", "sigmoid", wpo=True)
    case("sigmoid,ipo+wpo", "sigmoid,ipo", (1.0, 0.5), wpo=True)
    return out


def grpo_losses():
    rng = np.random.default_rng(1)
    mask = lengths_to_mask([7, 4, 1, 0, 3, 6, 2, 5])
    policy = -rng.gamma(1.0, 0.9, (B, T))
    arrays = {"policy": policy, "advantages": rng.normal(0, 1.0, B)}
    arrays |= {name: policy + rng.normal(0, 0.4, policy.shape) for name in ("old", "reference")}
    out = {f"grpo/{name}": np.float32(x) for name, x in arrays.items()} | {"grpo/mask": mask}
    nothing = torch.zeros(B, T)

    def case(name, loss_type, level, beta, high):
        leaf = torch.tensor(out["grpo/policy"], requires_grad=True)
        me = trainer(
            torch.nn.Module(),
            _get_per_token_logps_and_entropies=lambda *args, **kwargs: (leaf, nothing, None),
            args=types.SimpleNamespace(
                use_bias_correction_kl=False,
                delta=None,
                sapo_temperature_pos=1.0,
                sapo_temperature_neg=1.05,
                steps_per_generation=1,
            ),
            loss_type=loss_type,
            importance_sampling_level=level,
            beta=beta,
            epsilon_low=0.2,
            epsilon_high=high,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            use_vllm=False,
            max_completion_length=9,
            current_gradient_accumulation_steps=1,
            _entropy_bonus_enabled=False,
        )
        ids = torch.zeros(B, T, dtype=torch.long)
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ids[:, :1] + 1,
            "completion_ids": ids,
            "completion_mask": torch.tensor(mask),
            "advantages": torch.tensor(out["grpo/advantages"]),
            "old_per_token_logps": torch.tensor(out["grpo/old"]),
            "ref_per_token_logps": torch.tensor(out["grpo/reference"]),
            "num_items_in_batch": torch.tensor(int(mask.sum())),
        }
        loss = GRPOTrainer._compute_loss(me, me.model, inputs)
        loss.backward()
        out[f"grpo/{name}/loss"], out[f"grpo/{name}/gradient"] = loss.detach().numpy(), leaf.grad.numpy()

    for beta in (0.0, 0.3):
        for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "cispo"):
            case(f"{loss_type}:{beta}", loss_type, "token", beta, 1.3 if loss_type == "cispo" else 0.28)
        case(f"gspo:{beta}", "grpo", "sequence", beta, 0.28)
        case(f"luspo:{beta}", "luspo", "sequence", beta, 0.28)
    return out


def dpo_trajectory():
    """Five AdamW steps of sigmoid DPO, beta 0.1, on every weight of llama2/; the same batch at each."""
    generator = torch.Generator().manual_seed(5)
    batch = groups(generator, 3, 2, 8, 10, [8, 3, 5], [10, 4, 7, 7, 1, 9])
    ids, mask, positions = rows_of(*batch)
    P, target_mask = batch[0].shape[1], batch[3].flatten(0, 1).float()
    policy, reference = reload("llama2"), reload("llama2")

    def sums(model):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        logprobs = logits[:, P - 1 : -1].log_softmax(-1).gather(-1, ids[:, P:, None])[..., 0]
        return (logprobs * target_mask).sum(-1).reshape(-1, 2)

    with torch.no_grad():
        fixed = sums(reference)
    optimizer, losses = adamw(policy.parameters()), []
    for _ in range(STEPS):
        ratios = sums(policy) - fixed
        loss = -torch.nn.functional.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print("dpo losses", losses)
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    final = {f"final/{name}": weight.detach() for name, weight in policy.state_dict().items()}
    return as_numpy(dict(zip(names, batch, strict=True)) | {"losses": torch.tensor(losses)} | final)


if __name__ == "__main__":
    torch.set_num_threads(1)
    losses = dpo_losses() | grpo_losses()
    print({name: float(x) for name, x in losses.items() if name.endswith("/loss")})
    np.savez_compressed(os.path.join(HERE, "trl_losses.npz"), **losses)
    np.savez_compressed(os.path.join(HERE, "dpo.npz"), **dpo_trajectory())
