"""Makes encoders/ and encoders.npz of this folder. Run by hand in an environment with torch and transformers 5:

    python tests/golden/make_encoder_golden.py make                 writes the tiny checkpoints and their answers
    python tests/golden/make_encoder_golden.py compare DIRECTORY    checks what our code has exported (see `compare`)

Every number comes from torch and transformers in float32 on one thread; nothing of rlhf_jax is imported. PairRM's head
is written here from its description (Jiang et al. 2023, arXiv:2306.02561; state dict as published by llm-blender)."""

import json
import os
import shutil
import sys

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position
from transformers.models.t5.modeling_t5 import T5Attention

HERE = os.path.dirname(os.path.abspath(__file__))
ROOM = os.path.join(HERE, "encoders")
VOCAB, PAD, LENGTHS = 60, 1, [21, 13, 4, 1]
SIZES = dict(
    vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
)
SIZES |= dict(initializer_range=0.3, max_position_embeddings=40)
DEBERTA = SIZES | dict(
    relative_attention=True,
    max_relative_positions=-1,
    position_buckets=8,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    pos_att_type="p2c|c2p",
    position_biased_input=False,
    type_vocab_size=0,
    layer_norm_eps=1e-7,
    pad_token_id=PAD,
)
MODELS = {
    "bert": (
        BertForSequenceClassification,
        BertConfig(**SIZES, type_vocab_size=2, layer_norm_eps=1e-12, num_labels=1),
    ),
    "roberta": (
        RobertaForSequenceClassification,
        RobertaConfig(**SIZES, type_vocab_size=1, layer_norm_eps=1e-5, num_labels=3, pad_token_id=PAD),
    ),
    # v3: the settings of the published base and large models, narrower.
    "deberta_v3": (DebertaV2ForSequenceClassification, DebertaV2Config(**DEBERTA, num_labels=1)),
    # v2: a projection of its own for positions, one direction, types, absolute positions, every distance on its own
    # row, the convolution of v2-xlarge, narrower embeddings.
    "deberta_v2": (
        DebertaV2ForSequenceClassification,
        DebertaV2Config(
            **DEBERTA
            | dict(
                share_att_key=False,
                pos_att_type=["c2p", "p2c"],
                norm_rel_ebd="none",
                position_buckets=-1,
                max_relative_positions=16,
                position_biased_input=True,
                type_vocab_size=2,
                conv_kernel_size=3,
                conv_act="gelu",
                embedding_size=16,
                num_labels=2,
            )
        ),
    ),
}
T5 = dict(vocab_size=VOCAB, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=4, initializer_factor=1.0)
T5 |= dict(relative_attention_num_buckets=8, relative_attention_max_distance=20, decoder_start_token_id=0)
MARKERS = dict(source_prefix_id=57, cand1_prefix_id=58, cand2_prefix_id=59)


def make():
    torch.manual_seed(0)
    shutil.rmtree(ROOM, ignore_errors=True)
    out = {"lengths": np.array(LENGTHS)}
    for name, (cls, config) in MODELS.items():
        out |= {f"{name}_{key}": value for key, value in encoder(name, cls(config)).items()}
    as_the_first_checkpoints_were(os.path.join(ROOM, "bert"))
    out |= {f"pairrm_{key}": value for key, value in pairrm().items()}
    for name, settings in (
        ("t5", {}),
        ("flan", dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_decoder_layers=1)),
    ):
        out |= {f"{name}_{key}": value for key, value in t5(name, settings).items()}
    out |= buckets()
    np.savez_compressed(os.path.join(HERE, "encoders.npz"), **as_numpy(out))


def rough(model):
    """Ones and zeros would hide a mistake: noise on every norm and bias."""
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" in key.lower() or key.endswith("bias"):
                weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def padded(side, generator, pad_id=PAD):
    width = max(LENGTHS)
    ids = torch.randint(4, 57, (len(LENGTHS), width), generator=generator)
    slot, length = torch.arange(width)[None], torch.tensor(LENGTHS)[:, None]
    mask = (slot < length) if side == "right" else (slot >= width - length)
    return torch.where(mask, ids, pad_id), mask.long()


def encoder(name, model):
    """Hidden states with padding on each side; logits with padding on the right, where transformers reads [CLS]."""
    directory = os.path.join(ROOM, name)
    rough(model).save_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    generator, out = torch.Generator().manual_seed(1), {}
    for side in ("right", "left"):
        ids, mask = padded(side, generator)
        call = dict(input_ids=ids, attention_mask=mask)
        if model.config.type_vocab_size > 1:
            call["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=generator)
            out[f"{side}_types"] = call["token_type_ids"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        if name in ("bert", "deberta_v2"):  # by default these count padding on the left
            call["position_ids"] = positions
        with torch.no_grad():
            hidden = model.base_model(**call).last_hidden_state
            out |= {f"{side}_ids": ids, f"{side}_mask": mask, f"{side}_hidden": hidden * mask[..., None]}
            if side == "right":
                out["logits"] = model(**call).logits
    return out


def as_the_first_checkpoints_were(directory):
    """Norms named gamma and beta, a buffer of positions, and heads of pre-training that nobody reads."""
    path = os.path.join(directory, "model.safetensors")
    tensors = {}
    for key, value in load_file(path).items():
        key = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        tensors[key] = value
    tensors["bert.embeddings.position_ids"] = torch.arange(40)[None]
    tensors["cls.seq_relationship.bias"] = torch.zeros(2)
    save_file(tensors, path, metadata={"format": "pt"})


def pairrm():
    directory = os.path.join(ROOM, "pairrm")
    config = DebertaV2Config(**DEBERTA)
    backbone = rough(DebertaV2Model(config))
    D = config.hidden_size
    head = torch.nn.Sequential(
        torch.nn.Dropout(0.05),
        torch.nn.Linear(2 * D, D),
        torch.nn.Tanh(),
        torch.nn.Dropout(0.05),
        torch.nn.Linear(D, 1),
    ).eval()
    tensors = {f"pretrained_model.{key}": value for key, value in backbone.state_dict().items()}
    tensors |= {f"head_layer.{key}": value for key, value in head.state_dict().items()}
    os.makedirs(directory)
    save_file(tensors, os.path.join(directory, "model.safetensors"), metadata={"format": "pt"})
    raw = config.to_dict() | MARKERS | {"architectures": ["DebertaV2PairRM"], "n_tasks": 1, "drop_out": 0.05}
    json.dump(raw, open(os.path.join(directory, "config.json"), "w"), indent=2, default=str)
    generator = torch.Generator().manual_seed(3)
    ids, mask = padded("right", generator)
    ids, mask = ids[:3], mask[:3]
    at = torch.tensor([[1, 8, 15], [1, 5, 9], [0, 1, 2]])
    for column, marker in enumerate(MARKERS.values()):
        ids[torch.arange(3), at[:, column]] = marker
    with torch.no_grad():
        hidden = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        source, one, two = (hidden[torch.arange(3), at[:, i]] for i in range(3))
        scores = torch.stack([head(torch.cat([source, own], -1)) for own in (one, two)], 1)
    return {"ids": ids, "mask": mask, "scores": scores}


def t5(name, settings):
    directory = os.path.join(ROOM, name)
    model = rough(T5ForConditionalGeneration(T5Config(**T5, **settings)))
    with torch.no_grad():
        if settings:  # transformers 5 ties what the published files keep apart
            model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(model.shared.weight))
        for key, weight in model.named_parameters():
            if "relative_attention_bias" in key or key.endswith("SelfAttention.q.weight"):
                weight.mul_(4.0)  # so that positions matter
    model.save_pretrained(directory)
    if settings:  # as the hub has it
        path = os.path.join(directory, "config.json")
        raw = json.load(open(path)) | {"tie_word_embeddings": False}
        raw.pop("scale_decoder_outputs", None)
        json.dump(raw, open(path, "w"), indent=2)
    model = T5ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    generator, out = torch.Generator().manual_seed(2), {}
    decoder_ids = torch.randint(2, VOCAB, (len(LENGTHS), 9), generator=generator)
    decoder_ids[:, 0] = 0
    decoder_mask = (torch.arange(9)[None] < torch.tensor([9, 5, 1, 7])[:, None]).long()
    out |= {"decoder_ids": decoder_ids, "decoder_mask": decoder_mask}
    for side in ("right", "left"):
        ids, mask = padded(side, generator, pad_id=0)
        with torch.no_grad():
            answer = model(
                input_ids=ids,
                attention_mask=mask,
                decoder_input_ids=decoder_ids,
                decoder_attention_mask=decoder_mask,
            )
        logits = answer.logits * decoder_mask[..., None]
        encoded = answer.encoder_last_hidden_state * mask[..., None]
        out |= {
            f"{side}_ids": ids,
            f"{side}_mask": mask,
            f"{side}_logits": logits,
            f"{side}_encoded": encoded,
        }
    print(
        name,
        "ties",
        torch.equal(model.lm_head.weight, model.shared.weight),
        model.config.scale_decoder_outputs,
    )
    return out


def buckets():
    """Rows of the tables at every distance up to 700, with the settings of the published models."""
    away = torch.arange(-700, 701)
    return {
        "away": away,
        "deberta_buckets": make_log_bucket_position(away, 256, 512).long(),
        "t5_buckets": T5Attention._relative_position_bucket(away, True, 32, 128),
        "t5_causal_buckets": T5Attention._relative_position_bucket(away, False, 32, 128),
    }


def compare(directory):
    """DIRECTORY/*/ are written by save_encoder or save_t5, each with ours.npz: what our code answers on its inputs."""
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        ours = {k: torch.tensor(v) for k, v in np.load(os.path.join(path, "ours.npz")).items()}
        call = dict(input_ids=ours["ids"].long(), attention_mask=ours["mask"].long())
        if "types" in ours:
            call["token_type_ids"] = ours["types"].long()
        if "decoder_ids" in ours:
            call |= {k: ours[v].long() for k, v in (("decoder_input_ids", "decoder_ids"),)}
            call["decoder_attention_mask"] = ours["decoder_mask"].long()
            auto = T5ForConditionalGeneration
        else:
            auto = AutoModelForSequenceClassification if "logits" in ours else AutoModel
        model, info = auto.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        with torch.no_grad():
            answer = model.eval()(**call)
        if "decoder_mask" in ours:
            inside = ours["decoder_mask"][..., None].float()
            difference = ((answer.logits - ours["logits"]) * inside).abs().max()
        elif "logits" in ours:
            difference = (answer.logits - ours["logits"]).abs().max()
        else:
            inside = ours["mask"][..., None].float()
            difference = ((answer.last_hidden_state - ours["hidden"]) * inside).abs().max()
        left = {k: sorted(v) for k, v in info.items() if v}
        print(f"{name}: largest difference {float(difference):.2e}; {left}")


def as_numpy(tree):
    def plain(x):
        x = x.numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
        return x.astype(np.int16) if x.dtype == np.int64 else x

    return {name: plain(x) for name, x in tree.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, *arguments = sys.argv[1:] or ["help"]
    commands = {"make": make, "compare": compare}
    if command not in commands:
        sys.exit(__doc__)
    commands[command](*arguments)
