"""Supervised fine-tuning on completions.   python -m experiments.run --config=configs/sft.py:tiny --workdir=out

Data: --config.data.sft=FILE with rows input_text and output_text, or prompt and completion."""

from configs import common


def get_config(size="tiny"):
    config = common.get_config(size)
    config.stages = ("sft",)
    return config
