"""A reward role as a reward: completions are read exactly as in training, each ended by an end token.

Normalised so that samples of the reference have mean 0 and deviation 1 (Ziegler et al. 2019, section 2.1)."""

from rlhf_jax.models import roles
from rlhf_jax.models.llama import Llama
from rlhf_jax.types import GroupedBatch


def score(
    model: Llama,
    base: dict,
    role: roles.Role,
    batch: GroupedBatch,
    eos_ids: tuple[int, ...],
    mean=0.0,
    std=1.0,
):
    """[B, G] float32, (raw score - mean) / std. mean and std: of raw scores of the reference's samples.

    A completion cut at its length limit is scored with an end token after it: the text is what counts; what a
    missing end costs is the algorithm's rule, not the reward model's guess.
    """
    return score_and_disagreement(model, base, role, batch, eos_ids, mean, std)[0]


def score_and_disagreement(model: Llama, base: dict, role: roles.Role, batch, eos_ids, mean=0.0, std=1.0):
    """(score, deviation between the members of an ensemble [B, G] in the same unit; None of a single model)."""
    ended, disagreement = roles.end_with(batch, eos_ids[0], eos_ids), None
    if role.members:
        scores, disagreement = roles.scores_and_disagreement(model, base, role, ended)
        disagreement = disagreement / std
    else:
        scores = roles.scores(model, base, role, ended)
    return (scores - mean) / std, disagreement
