"""Values and gradients of TRL 1.16's own trainers on the same log-probabilities (tests/golden/make_trl_golden.py).

DPO goes through the objective that a run calls, GRPO through the loss."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import grpo
from rlhf_jax.losses.preference import LOSSES
from rlhf_jax.models.roles import Role
from rlhf_jax.training.algorithms.preference import DPOSettings, dpo_objective
from rlhf_jax.types import GroupedBatch

with np.load(pathlib.Path(__file__).parent.parent / "golden" / "trl_losses.npz") as file:
    GOLDEN = dict(file)
names_of = lambda algorithm: [
    name.split("/")[1] for name in GOLDEN if name.startswith(algorithm + "/") and name.endswith("/loss")
]
DPO, GRPO = names_of("dpo"), names_of("grpo")
WEIGHTS = {
    "sigmoid,bco_pair,sft": (0.8, 0.2, 1.0),
    "sigmoid,ipo": (1.0, 0.5),
    "hinge,aot,sigmoid_norm": (0.8, 0.2, 0.5),
    "hinge,sigmoid_norm": (0.8, 0.5),
    "hinge,apo_zero": (1.0, 0.5),
}


class Given:
    """In the place of a Network: what a role assigns is the role itself."""

    def __init__(self, collision):
        self.collision = collision

    def logprobs(self, base, role, batch):
        return role.base, None, None

    def log_collision(self, base, role, states):
        return self.collision


def dpo_settings(name):
    """Of a case LOSSES[:DIVERGENCE][+FEATURE]."""
    (rest, _, feature), fields = name.partition("+"), dict(beta=0.3)
    loss_type, _, divergence = rest.partition(":")
    if "sigmoid" not in loss_type.split(","):  # TRL's sigmoid does not read it
        fields["label_smoothing"] = 0.1
    fields |= dict(f_divergence=divergence) if divergence else {}
    fields |= {"tail": dict(tail_weight=0.4), "wpo": dict(wpo=True), "": {}}[feature]
    return DPOSettings(loss_type=loss_type, loss_weights=WEIGHTS.get(loss_type, (1.0,)), **fields)


@functools.cache
def dpo():
    """{case: (loss, gradient by the policy's log-probabilities)}, compiled together."""
    pairs = lambda x: x.reshape(2, -1, x.shape[-1]).swapaxes(
        0, 1
    )  # TRL has all chosen rows before the rejected
    given = {
        name: pairs(GOLDEN[f"dpo/{name}"])
        for name in ("policy", "reference", "collision", "mask", "even_mask")
    }

    def one(policy, name):
        settings = dpo_settings(name)
        assert settings.check() is None
        mask = given["even_mask" if "sft" in name else "mask"]
        ids = np.zeros(mask.shape, np.int32)
        batch = GroupedBatch(ids[:, 0], mask[:, 0], ids, mask, weights=np.ones(mask.shape[:2], np.float32))
        batch = batch.replace(ref_logprobs=np.where(mask, given["reference"], np.nan))
        policy = jnp.where(mask > 0, policy, jnp.nan)
        return dpo_objective(
            settings,
            Given(given["collision"]),
            {"policy": Role(base=policy)},
            {"base": None},
            {},
            batch,
            None,
        )[0]

    all_of_them = lambda policy: {name: jax.value_and_grad(one)(policy, name) for name in DPO}
    back = lambda x: x.swapaxes(0, 1).reshape(-1, x.shape[-1])
    return {
        name: (loss, back(slope)) for name, (loss, slope) in jax.jit(all_of_them)(given["policy"]).items()
    }


@functools.cache
def grpo_losses():
    old, reference, advantages, mask = (
        GOLDEN[f"grpo/{name}"] for name in ("old", "reference", "advantages", "mask")
    )

    def one(policy, name):
        loss_type, beta = name.split(":")
        return grpo.grpo_loss(
            policy,
            old,
            reference if float(beta) else None,
            advantages,
            mask,
            clip_low=0.2,
            clip_high=1.3 if loss_type == "cispo" else 0.28,
            beta=float(beta),
            loss_type=loss_type,
            max_length=9,
        )[0]

    all_of_them = lambda policy: {name: jax.value_and_grad(one)(policy, name) for name in GRPO}
    return jax.jit(all_of_them)(GOLDEN["grpo/policy"])


@pytest.mark.parametrize("name", DPO)
def test_dpo(name):
    loss, gradient = dpo()[name]
    np.testing.assert_allclose(loss, GOLDEN[f"dpo/{name}/loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient, GOLDEN[f"dpo/{name}/gradient"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", GRPO)
def test_grpo(name):
    loss, gradient = grpo_losses()[name]
    np.testing.assert_allclose(loss, GOLDEN[f"grpo/{name}/loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient, GOLDEN[f"grpo/{name}/gradient"], rtol=1e-5, atol=1e-7)


def test_every_loss_that_trl_has_is_held_to_it():
    seen = {part for name in DPO for part in name.partition(":")[0].partition("+")[0].split(",")}
    assert seen == set(LOSSES) - {"ipo_sum"}  # the paper's own, which TRL has not
    assert {name.split(":")[0] for name in GRPO} == set(grpo.LOSSES) - {"gspo_token"}
