"""What is timed against the peers: model shapes, workloads and their data. Imported by every side, so it imports no
framework.

All rows have the same length and all completions run to their limit, so that no side wins by padding or by luck."""

import dataclasses
import random


@dataclasses.dataclass(frozen=True)
class Shape:
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    tied: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


SHAPES = {
    "T": Shape(4096, 256, 4, 4, 4, 688),
    "S": Shape(32000, 512, 8, 8, 8, 1376),
    "M": Shape(49152, 576, 30, 9, 3, 1536, tied=True),  # SmolLM2-135M's
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """kind: sample, sft, dpo, grpo, ppo. rows: prompts (dpo: pairs); each has `completions`, of `completion` tokens."""

    kind: str
    shape: str
    rows: int
    prompt: int
    completion: int
    completions: int = 1
    lora: bool = False
    epochs: int = 1

    @property
    def model(self) -> Shape:
        return SHAPES[self.shape]

    @property
    def sequences(self) -> int:
        return self.rows * self.completions


LORA_RANK = 16
TEMPERATURE = 1.0
KL = {"grpo": 0.04, "ppo": 0.05}
LEARNING_RATE = 1e-5
REWARDED = r"w\d*7 w\d*7"  # of grpo: a completion with two words that end in 7, one after the other
WORKLOADS = {
    "sample_S": Workload("sample", "S", 16, 64, 64),
    "sample_M": Workload("sample", "M", 16, 64, 64),
    "sample_1_S": Workload("sample", "S", 1, 64, 64),
    "sft_full_S": Workload("sft", "S", 8, 1, 255),
    "sft_lora_S": Workload("sft", "S", 8, 1, 255, lora=True),
    "dpo_lora_S": Workload("dpo", "S", 4, 128, 128, completions=2, lora=True),
    "grpo_lora_S": Workload("grpo", "S", 4, 64, 64, completions=4, lora=True),
    "grpo_lora_M": Workload("grpo", "M", 4, 64, 64, completions=4, lora=True),
    "grpo_long_S": Workload("grpo", "S", 4, 512, 64, completions=8, lora=True),
    "ppo_full_S": Workload("ppo", "S", 16, 64, 64, epochs=4),
    "ppo_lora_S": Workload("ppo", "S", 16, 64, 64, epochs=4, lora=True),
    # Small enough for a glance: every side in seconds.
    "sample_T": Workload("sample", "T", 4, 16, 16),
    "sft_full_T": Workload("sft", "T", 4, 1, 63),
    "sft_lora_T": Workload("sft", "T", 4, 1, 63, lora=True),
    "dpo_lora_T": Workload("dpo", "T", 2, 32, 32, completions=2, lora=True),
    "grpo_lora_T": Workload("grpo", "T", 2, 16, 16, completions=2, lora=True),
    "ppo_full_T": Workload("ppo", "T", 4, 16, 16, epochs=2),
    "ppo_lora_T": Workload("ppo", "T", 4, 16, 16, epochs=2, lora=True),
}

# The vocabulary: pad, begin, end, then words that stand for their own id, so that text and ids are the same thing.
PAD_ID, BOS_ID, EOS_ID, FIRST_WORD = 0, 1, 2, 3


def word(token_id: int) -> str:
    return f"w{token_id}"


def text(ids) -> str:
    return " ".join(word(i) for i in ids)


def rows(workload: Workload, count: int, seed: int = 0):
    """`count` times (prompt ids, [completion ids]), all words: the end token is the side's to put after them."""
    draw = random.Random(seed)
    ids = lambda n: [draw.randrange(FIRST_WORD, workload.model.vocab_size) for _ in range(n)]
    for _ in range(count):
        yield ids(workload.prompt), [ids(workload.completion - 1) for _ in range(workload.completions)]
