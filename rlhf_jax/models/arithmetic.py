"""The floating-point operations that a decoder cannot do without: what no program gets below.

Each prompt once, however many completions it has; vocabulary logits at completion positions only; real tokens only;
nothing that is computed a second time to save memory; no gradient of frozen weights. Products of matrices alone, two
operations a multiply-add: adapters, heads of one output, norms and the embedding count nothing. Plain Python on the
numbers of a LlamaConfig, or of anything with its fields. Knows no arrays."""

import dataclasses
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Of a batch: how many go through the layers, how many of them are predicted, and how many pairs of a token and one
    that it reads there are."""

    run: float
    predicted: float
    read: float

    @classmethod
    def of_groups(cls, prompts: Sequence[int], completions: Sequence[Sequence[int]]) -> "Tokens":
        """prompts: tokens of each of B prompts. completions: of each of the completions of each, [B][G]."""
        made = sum(map(sum, completions))
        # A prompt token reads half of the prompt on average, a completion token all of it and half of its completion.
        read = sum(P * P / 2 for P in prompts)
        read += sum(R * (P + R / 2) for P, group in zip(prompts, completions, strict=True) for R in group)
        return cls(sum(prompts) + made, made, read)

    @classmethod
    def of_texts(cls, lengths: Iterable[int], predicted: int) -> "Tokens":
        """Texts that read nothing of each other, as in packed rows; `predicted` of all their tokens."""
        lengths = list(lengths)
        return cls(sum(lengths), predicted, sum(T * T / 2 for T in lengths))


@dataclasses.dataclass(frozen=True)
class Forward:
    """FLOPs of one forward pass, by part."""

    layers: float
    head: float
    attention: float

    def times(self, layers: float, head: float | None = None, attention: float = 3) -> float:
        """FLOPs with each part as often as said. head: None: as the layers. attention: 3 with a backward pass."""
        head = layers if head is None else head
        return layers * self.layers + head * self.head + attention * self.attention


def forward(config, tokens: Tokens, num_layers: int | None = None) -> Forward:
    """num_layers: of a trunk that is cut off; None: all of the config's."""
    depth = config.num_layers if num_layers is None else num_layers
    return Forward(
        2 * tokens.run * depth * layer_values(config),
        2 * tokens.predicted * config.vocab_size * config.hidden_size,
        4 * depth * config.num_heads * config.head_dim * tokens.read,
    )


def layer_values(config) -> int:
    """Weights in the products of one layer."""
    attention = 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)
    return attention + 3 * config.hidden_size * config.intermediate_size


def training_passes(full: bool) -> int:
    """Forward passes that a forward and backward pass is worth: without gradients of frozen weights it is 2, not 3."""
    return 3 if full else 2
