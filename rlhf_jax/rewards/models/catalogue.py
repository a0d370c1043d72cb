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
    from rlhf_jax.parallel import hosts
    from rlhf_jax.rewards.models.judge import PRINCIPLE, Judge

    with hosts.alone():  # each host has a cache of its own
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


def encoder(path: str, output: int = -1, max_tokens: int = 0, batch_size: int = 16, *, mesh=None):
    """A BERT, RoBERTa or DeBERTa classifier."""
    from rlhf_jax.rewards.models.encoder import Encoder

    return Encoder(path, output=output, max_tokens=max_tokens, batch_size=batch_size, mesh=mesh)


def pairrm(
    path: str, source_tokens: int = 1224, candidate_tokens: int = 412, batch_size: int = 8, *, mesh=None
):
    """llm-blender/PairRM or a model of its kind."""
    from rlhf_jax.rewards.models.pairrm import PairRM

    limits = dict(source_tokens=source_tokens, candidate_tokens=candidate_tokens)
    return PairRM(path, **limits, batch_size=batch_size, mesh=mesh)


def steamshp(path: str, max_tokens: int = 512, batch_size: int = 8, *, mesh=None):
    """stanfordnlp/SteamSHP-flan-t5-large or a model of its kind."""
    from rlhf_jax.rewards.models.steamshp import SteamSHP

    return SteamSHP(path, max_tokens=max_tokens, batch_size=batch_size, mesh=mesh)


MODELS = {"decoder": decoder, "encoder": encoder, "pairrm": pairrm, "steamshp": steamshp, "judge": judge}
LEAST = {"pairrm": 2, "judge": 2}  # completions of a prompt that it needs at once, known before it is loaded
