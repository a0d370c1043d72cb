"""Published runs as configs.   python -m experiments.run --config=configs/recipes/tldr.py:llama2_7b --workdir=out

What a paper says of its algorithm holds at every size; its data, lengths, batches, steps and rates hold at all but
tiny, which keeps its own and runs in a minute. Sizes name models: a paper's own was often another one. Values marked
"ours" the paper does not give. Data are files in the forms that README lists, or data sets of the Hugging Face hub."""


def published(config, size: str, *stages: str, **data) -> bool:
    """Whether `size` is a real one; then the config runs `stages` and the evaluation on `data`, keys of config.data.

    The papers had no gate; a reward model that ours refuses would not give their results either."""
    if size == "tiny":
        if "evaluation" not in config.stages:
            config.stages = (*config.stages, "evaluation")
        return False
    after = lambda stage: ("gate",) if stage == "reward_model" else ()
    config.stages = (*(one for stage in stages for one in (stage, *after(stage))), "evaluation")
    config.gold = ""
    config.data.update(data)
    return True


def epochs(num_records: int, times: float, batch_size: int) -> dict:
    """steps and batch_size of `times` passes over the records."""
    return dict(steps=-(-int(num_records * times) // batch_size), batch_size=batch_size)
