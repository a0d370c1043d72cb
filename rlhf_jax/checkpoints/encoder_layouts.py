"""Which stored tensors make which arrays of BERT, RoBERTa, DeBERTa, T5 and their heads.

Names are those of transformers without the model's prefix (`bert.`, `deberta.`, ...), which encoders.py takes off and
puts back. Opens no file."""

from rlhf_jax.checkpoints.tensors import Leaf
from rlhf_jax.models.encoder_config import BertConfig, DebertaConfig, T5Config
from rlhf_jax.models.encoder_heads import dense_inputs

_HEADS = {  # (dense, out) by kind of head; where transformers differs by model, by model
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "pooled": ("pooler.dense", "classifier"),
    "mean": (None, "mean_head"),  # ours: transformers has none
    "pairrm": ("head_layer.1", "head_layer.4"),
}


class _Layers:
    """Leaves of the layers `first` to `last - 1` under one path, stacked; or of one layer alone."""

    def __init__(self, path: tuple[str, ...], stored: str, numbers: range, stacked: bool = True):
        self.path, self.stored, self.numbers, self.stacked = path, stored, numbers, stacked

    def leaf(self, path, name, groups, transposed=False):
        names = tuple(self.stored.format(i) + name for i in self.numbers)
        return Leaf(self.path + path, names, groups, transposed, self.stacked)

    def linear(self, path, name, inputs, outputs, bias=True):
        kernel = self.leaf((*path, "kernel"), f"{name}.weight", (outputs, inputs), True)
        return [kernel, self.leaf((*path, "bias"), f"{name}.bias", (outputs,))] if bias else [kernel]

    def norm(self, path, name, width):
        return [self.leaf((path, ours), f"{name}.{its}", (width,)) for ours, its in _NORM]


_NORM = (("scale", "weight"), ("bias", "bias"))


def _table(name, stored, rows, width):
    return Leaf((name, "embedding"), (stored,), ((rows,), (width,)))


def _norm(name, stored, width):
    return [Leaf((name, ours), (f"{stored}.{its}",), (width,)) for ours, its in _NORM]


def bert(c: BertConfig) -> list[Leaf]:
    """Every array of Bert and the tensors of transformers' BertModel or RobertaModel."""
    rows = {"word": c.vocab_size, "position": c.max_position, "token_type": c.type_vocab_size}
    names = {"word": "words", "position": "positions", "token_type": "types"}
    leaves = [
        _table(ours, f"embeddings.{its}_embeddings.weight", rows[its], c.hidden_size)
        for its, ours in names.items()
    ]
    leaves += _norm("embedding_norm", "embeddings.LayerNorm", (c.hidden_size,))
    layers = _Layers(("layers",), "encoder.layer.{}.", range(c.num_layers))
    return leaves + _post_norm_layers(layers, c, {"q": "query", "k": "key", "v": "value"})


def deberta(c: DebertaConfig) -> list[Leaf]:
    """Every array of Deberta and the tensors of transformers' DebertaV2Model."""
    D, width = (c.hidden_size,), c.embedding_size
    leaves = [_table("words", "embeddings.word_embeddings.weight", c.vocab_size, width)]
    if c.position_biased_input:
        leaves.append(_table("positions", "embeddings.position_embeddings.weight", c.max_position, width))
    if c.type_vocab_size:
        leaves.append(_table("types", "embeddings.token_type_embeddings.weight", c.type_vocab_size, width))
    if width != c.hidden_size:
        path = ("embedding_projection", "kernel")
        leaves.append(Leaf(path, ("embeddings.embed_proj.weight",), (D, (width,)), True))
    leaves += _norm("embedding_norm", "embeddings.LayerNorm", D)
    targets = {"q": "query_proj", "k": "key_proj", "v": "value_proj"}
    if c.relative_attention:
        leaves.append(_table("relative", "encoder.rel_embeddings.weight", 2 * c.position_span, c.hidden_size))
        if c.norm_rel_ebd:
            leaves += _norm("relative_norm", "encoder.LayerNorm", D)
        if not c.share_att_key:
            own = {"c2p": ("position_key", "pos_key_proj"), "p2c": ("position_query", "pos_query_proj")}
            targets |= dict(own[kind] for kind in c.pos_att_type)
    start = 0
    if c.conv_kernel_size:
        start = 1
        leaves += _post_norm_layers(
            _Layers(("first",), "encoder.layer.{}.", range(1), stacked=False), c, targets
        )
        leaves.append(Leaf(("conv", "kernel"), ("encoder.conv.conv.weight",), (D, D, (c.conv_kernel_size,))))
        leaves.append(Leaf(("conv", "bias"), ("encoder.conv.conv.bias",), (D,)))
        leaves += _norm("conv_norm", "encoder.conv.LayerNorm", D)
    if start < c.num_layers:
        layers = _Layers(("layers",), "encoder.layer.{}.", range(start, c.num_layers))
        leaves += _post_norm_layers(layers, c, targets)
    return leaves


def _post_norm_layers(layers: _Layers, c, targets: dict[str, str]) -> list[Leaf]:
    D, F, heads = (c.hidden_size,), (c.intermediate_size,), (c.num_heads, c.head_dim)
    leaves = layers.linear(("out",), "attention.output.dense", heads, D)
    for ours, its in targets.items():
        leaves += layers.linear(("attention", ours), f"attention.self.{its}", D, heads)
    leaves += layers.linear(("up",), "intermediate.dense", D, F) + layers.linear(
        ("down",), "output.dense", F, D
    )
    leaves += layers.norm("attention_norm", "attention.output.LayerNorm", D)
    return leaves + layers.norm("mlp_norm", "output.LayerNorm", D)


def head(c: BertConfig | DebertaConfig) -> list[Leaf]:
    """The arrays of the config's head; none if it has no head."""
    if c.head is None:
        return []
    roberta = isinstance(c, BertConfig) and c.kind != "bert" and c.head == "cls_tanh"
    kind = "roberta" if roberta else c.head if c.head in _HEADS else "pooled"
    dense, out = _HEADS[kind]
    D, K, leaves = (c.hidden_size,), (c.num_labels,), []
    if (inputs := dense_inputs(c.head, c.hidden_size)) is not None:
        leaves += _single_linear("dense", dense, (inputs,), D)
    return leaves + _single_linear("out", out, D, K)


def _single_linear(name, stored, inputs, outputs):
    return [
        Leaf((name, "kernel"), (f"{stored}.weight",), (outputs, inputs), True),
        Leaf((name, "bias"), (f"{stored}.bias",), (outputs,)),
    ]


def t5(c: T5Config) -> list[Leaf]:
    """Every array of T5 and the tensors of transformers' T5ForConditionalGeneration."""
    D, F, heads = (c.hidden_size,), (c.intermediate_size,), (c.num_heads, c.head_dim)
    leaves = [_table("embed", "shared.weight", c.vocab_size, c.hidden_size)]
    for side, length in (("encoder", c.num_layers), ("decoder", c.num_decoder_layers)):
        layers = _Layers((side, "layers"), side + ".block.{}.layer.", range(length))
        parts = [("attention", "0.SelfAttention")] + [("cross", "1.EncDecAttention")] * (side == "decoder")
        for ours, its in parts:
            for target in "qkv":
                leaves += layers.linear((ours, target), f"{its}.{target}", D, heads, bias=False)
            leaves += layers.linear((ours, "o"), f"{its}.o", heads, D, bias=False)
            leaves.append(layers.leaf((f"{ours}_norm", "scale"), f"{its[0]}.layer_norm.weight", (D,)))
        number = len(parts)
        for ours, its in {"gate": "wi_0", "up": "wi_1"}.items() if c.gated else {"up": "wi"}.items():
            leaves += layers.linear(("mlp", ours), f"{number}.DenseReluDense.{its}", D, F, bias=False)
        leaves += layers.linear(("mlp", "down"), f"{number}.DenseReluDense.wo", F, D, bias=False)
        leaves.append(layers.leaf(("mlp_norm", "scale"), f"{number}.layer_norm.weight", (D,)))
        name = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        leaves.append(Leaf((side, "relative_bias"), (name,), ((c.num_buckets,), (c.num_heads,))))
        leaves.append(Leaf((side, "final_norm", "scale"), (f"{side}.final_layer_norm.weight",), (D,)))
    if not c.tie_embeddings:
        leaves.append(Leaf(("lm_head", "kernel"), ("lm_head.weight",), ((c.vocab_size,), D), True))
    return leaves
