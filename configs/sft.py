"""Supervised fine-tuning on completions.   python -m experiments.run --config=configs/sft.py:tiny --workdir=out

Data: --config.data.sft=FILE with rows input_text and output_text, or prompt and completion: the completions are
learned; or with plain text: all of it is. --config.sft.packed_tokens=2048 joins short examples into rows of as many
tokens, with no example reading another; --config.sft.batch_size then counts rows."""

from configs import common


def get_config(size="tiny"):
    config = common.get_config(size)
    config.stages = ("sft",)
    return config
