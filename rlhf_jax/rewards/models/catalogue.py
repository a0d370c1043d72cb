"""The models that a config can name as a reward, with their parameters: decoder:path=org/name,template=true.

A factory's signature is what a spec may say; its keyword-only arguments come from the run. It gives a TextReward
(protocol.py) and is the first to import anything heavy: the worker of the user's own functions reads this file."""


def decoder(
    path: str, output: int = 0, template: bool = False, max_tokens: int = 0, batch_size: int = 8, *, mesh=None
):
    """A Llama-family reward model with its own tokenizer."""
    from rlhf_jax.rewards.models.decoder import Decoder

    return Decoder(
        path, output=output, template=template, max_tokens=max_tokens, batch_size=batch_size, mesh=mesh
    )


def judge(
    path: str,
    principle: str = "",
    template: bool = False,
    max_tokens: int = 0,
    batch_size: int = 8,
    *,
    mesh=None,
):
    """A decoder that is asked which of two completions it prefers."""
    from rlhf_jax.checkpoints import gguf, huggingface
    from rlhf_jax.data.tokenization import load_tokenizer
    from rlhf_jax.models.llama import Llama
    from rlhf_jax.rewards.models.judge import PRINCIPLE, Judge

    directory = gguf.embedded_model() if path == "smollm2" else huggingface.resolve(path)
    config, params = huggingface.load_llama(directory, mesh=mesh)
    tokenizer = load_tokenizer(directory, config.eos_ids)
    tokenizer.check_vocabulary(config.vocab_size)
    return Judge(
        Llama(config),
        params,
        tokenizer,
        principle=principle or PRINCIPLE,
        template=template,
        max_tokens=max_tokens,
        batch_size=batch_size,
        mesh=mesh,
    )


MODELS = {"decoder": decoder, "judge": judge}
LEAST = {"judge": 2}  # completions of a prompt that it needs at once, known before it is loaded
