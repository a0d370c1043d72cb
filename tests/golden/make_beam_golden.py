"""Makes beam.npz, beam_groups.npz and filters.npz of this folder, from the checkpoints llama2/ and llama3/ in it.

    python tests/golden/make_beam_golden.py make      with torch and transformers 5: beam.npz, filters.npz
    python tests/golden/make_beam_golden.py groups    with transformers before 4.57, the last with group beam search

Every number comes from torch and transformers on one thread, and every search without groups is made in float32 and
in float64: prompts whose sequences differ between the two are not taken. The tests read the files
and need none of this."""

import json
import os
import sys

import numpy as np
import torch
from transformers import LlamaForCausalLM
from transformers.generation import logits_process

HERE = os.path.dirname(os.path.abspath(__file__))
PAD, LENGTHS = 1, (7, 3, 10, 1)  # with pad 0 transformers fills with an end token
MANY = [2, 3, *range(60, 70)]  # end tokens enough that random weights reach one
CASES = {
    "plain": dict(model="llama3", num_return=4, max_new_tokens=10, eos_ids=MANY),
    "early": dict(model="llama2", num_beams=3, num_return=3, eos_ids=MANY, early_stopping=True),
    "never": dict(model="llama2", num_return=2, eos_ids=MANY, early_stopping="never", length_penalty=0.7),
    "short": dict(model="llama2", num_beams=3, num_return=3, eos_ids=MANY, length_penalty=-0.7),
    "held_back": dict(model="llama3", num_beams=5, num_return=5, eos_ids=MANY, min_new_tokens=5),
}
GROUPS = {  # of llama2 alone: the config of llama3/ is of transformers 5
    "pairs": dict(model="llama2", num_beams=4, num_groups=2, diversity_penalty=0.7, eos_ids=[]),
    "ends": dict(
        model="llama2", num_beams=6, num_groups=3, diversity_penalty=0.4, eos_ids=MANY, length_penalty=0.5
    ),
}
DEFAULTS = dict(num_beams=4, num_return=1, max_new_tokens=9, length_penalty=1.0, early_stopping=False)


def make():
    out = {}
    for name, case in CASES.items():
        out |= searched(name, DEFAULTS | case)
    np.savez_compressed(os.path.join(HERE, "beam.npz"), **out)
    np.savez_compressed(os.path.join(HERE, "filters.npz"), **filters())


def groups():
    out = {}
    for name, case in GROUPS.items():
        # There a group that is done goes on to pick pad tokens, which count against the others: MANY has no pad in it.
        out |= searched(name, DEFAULTS | case | dict(num_return=case["num_beams"]))
    np.savez_compressed(os.path.join(HERE, "beam_groups.npz"), **out)


def load(name):
    return LlamaForCausalLM.from_pretrained(os.path.join(HERE, name)).eval()


def searched(name, case):
    """{name/settings, prompt_ids, prompt_mask, ids [B, K, R], scores [B, K]} for the first prompts that will do."""
    model, exact = load(case["model"]).float(), load(case["model"]).double()
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        width = max(LENGTHS)
        prompt_ids = torch.randint(4, 96, (len(LENGTHS), width), generator=generator)
        prompt_mask = (torch.arange(width)[None] >= width - torch.tensor(LENGTHS)[:, None]).long()
        prompt_ids = torch.where(prompt_mask > 0, prompt_ids, PAD)
        ids, scores = search(model, prompt_ids, prompt_mask, case)
        if "num_groups" not in case and not torch.equal(ids, search(exact, prompt_ids, prompt_mask, case)[0]):
            continue
        ends = np.isin(ids.numpy(), case["eos_ids"])
        padding = np.cumsum(ends, -1) - ends > 0
        if ((ids == PAD).numpy() != padding).any():
            continue  # it says pad
        ended = ends.any(-1)
        if case["eos_ids"] and not 0 < ended.sum() < ended.size:
            continue
        # What a case is there for has to matter in it.
        others = [case | {key: DEFAULTS[key]} for key in ("length_penalty", "early_stopping")]
        others += [case | dict(min_new_tokens=None)] if "min_new_tokens" in case else []
        if all(
            other == case or not torch.equal(ids, search(model, prompt_ids, prompt_mask, other)[0])
            for other in others
        ):
            break
    else:
        raise SystemExit(f"{name}: none of the seeds will do")
    print(f"{name}: seed {seed}, {ended.sum()} of {ended.size} end; lengths {(ids != PAD).sum(-1).tolist()}")
    found = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "ids": ids, "scores": scores}
    found = {f"{name}/{key}": plain(x) for key, x in found.items()}
    return found | {f"{name}/settings": np.array(json.dumps(case))}


def search(model, prompt_ids, prompt_mask, case):
    """(ids [B, K, R], scores [B, K]) of transformers' generate."""
    K, R = case["num_return"], case["max_new_tokens"]
    groups = {}
    if "num_groups" in case:
        groups = dict(num_beam_groups=case["num_groups"], diversity_penalty=case["diversity_penalty"])
    with torch.no_grad():
        made = model.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            num_beams=case["num_beams"],
            num_return_sequences=K,
            max_new_tokens=R,
            min_new_tokens=case.get("min_new_tokens"),
            length_penalty=case["length_penalty"],
            early_stopping=case["early_stopping"],
            eos_token_id=case["eos_ids"] or None,
            pad_token_id=PAD,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **groups,
        )
    ids = made.sequences[:, prompt_ids.shape[1] :]
    ids = torch.nn.functional.pad(ids, (0, R - ids.shape[1]), value=PAD).reshape(len(prompt_ids), K, R)
    return ids, made.sequences_scores.reshape(len(prompt_ids), K)


def filters():
    """What transformers' processors make of random logits."""
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn((6, 40), generator=generator)
    seen = torch.randint(0, 40, (6, 9), generator=generator)
    p = logits_process
    return {
        "logits": plain(logits),
        "seen": plain(seen),
        "repetition_1.3": plain(p.RepetitionPenaltyLogitsProcessor(1.3)(seen, logits)),
        "repetition_0.7": plain(p.RepetitionPenaltyLogitsProcessor(0.7)(seen, logits)),
        "min_p_0.05": plain(p.MinPLogitsWarper(0.05)(seen, logits)),
        "min_p_0.5": plain(p.MinPLogitsWarper(0.5)(seen, logits)),
        "top_p_0.9_min_p_0.1": plain(p.MinPLogitsWarper(0.1)(seen, p.TopPLogitsWarper(0.9)(seen, logits))),
    } | repetition()


def repetition():
    """Greedy continuations under the penalty; a row each, since transformers counts padding as seen."""
    model = load("llama2").double()
    prompts = torch.randint(4, 96, (4, 8), generator=torch.Generator().manual_seed(6))
    call = dict(max_new_tokens=16, do_sample=False, pad_token_id=PAD, eos_token_id=None)
    made = model.generate(prompts, attention_mask=prompts * 0 + 1, repetition_penalty=1.5, **call)
    free = model.generate(prompts, attention_mask=prompts * 0 + 1, **call)
    print(f"the penalty changes {(made != free).any(-1).sum()} of {len(made)} rows")
    return {"repetition_prompts": plain(prompts), "repetition_greedy": plain(made[:, 8:])}


def plain(x):
    x = x.numpy()
    return x.astype(np.int32) if x.dtype == np.int64 else x.astype(np.float32)


if __name__ == "__main__":
    torch.set_num_threads(1)
    commands = {"make": make, "groups": groups}
    if sys.argv[1:2] and sys.argv[1] in commands:
        commands[sys.argv[1]]()
    else:
        sys.exit(__doc__)
