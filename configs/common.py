"""What every experiment shares, and the sizes: tiny, smollm2, llama2_7b, llama2_13b, llama2_70b.

Every key is here or in the experiment's own file, and every key is read. Durations carry their unit in the name."""

from ml_collections import config_dict


def get_config(size: str = "tiny") -> config_dict.ConfigDict:
    if size not in SIZES:
        raise ValueError(f"the size is {size!r}; expected one of {', '.join(SIZES)}")
    config = config_dict.ConfigDict()
    config.seed = 0
    config.stages = ()
    config.model = dict(
        path=size,  # tiny (self-made), smollm2 (embedded), or a Hugging Face directory or id
        dtype="float32",  # of the computation
        param_dtype="float32",  # of the frozen base
        remat="full",  # what the backward pass computes again: none (no product), dots (of attention), full (all)
        vocab_chunk=8192,  # vocabulary entries of logits at a time; 0: all at once
        # plain, splash (kernels for a TPU that keep no scores in memory), or auto: splash on a TPU, plain elsewhere.
        attention="auto",
        # Of the base's projections: none; int8, a scale an output; nf4, 4 bits, a scale for 64 weights. What is trained
        # is then adapters and heads.
        quantise="none",
    )
    config.lora = dict(
        rank=16, alpha=32.0, targets="all", rslora=False
    )  # all, attention, or names with commas
    config.mesh = dict(data=1, fsdp=-1, tensor=1)  # their product is the number of devices; -1: the rest
    config.data = dict(
        prompts="",  # JSONL path or glob, hub id, tfds:name; empty: the packaged openings
        eval_prompts="",  # empty: the last held_out_prompts of the prompts
        preferences="",  # empty: what the stage `preferences` made
        eval_preferences="",  # empty: as made, or the last held_out_pairs of the preferences
        sft="",  # rows input_text and output_text; tiny has a small corpus of its own
        instruction="",  # put before each input
        prompt_tokens=16,
        completion_tokens=20,
        # Of SFT, reward models and preferences: a batch is padded to the first of 1/n, 2/n, ... of the longest record
        # that holds it, and the update compiled for each that occurs; records of so many batches are dealt by length.
        length_buckets=1,
        sort_batches=1,
        prompt_overflow="truncate_left",  # or error, drop
        held_out_prompts=96,
        held_out_pairs=96,
        max_bad_records=0.0,  # fraction of the records that may be unusable
    )
    config.sampling = dict(
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,  # of the largest probability, that a token needs; 0: none
        repetition_penalty=1.0,  # of tokens that the prompt or the completion has; 1: none
        min_new_tokens=0,
        # How it is done, not what is sampled; docs/performance.md says when it pays.
        slots=0,  # completions that are decoded together, while others wait for one to end; 0: all
        halvings=-1,  # how often what is left of them goes on as a batch of half the size; -1: as it pays
    )
    config.rewards = dict(
        # Of the policy: learned (the reward model); a rule: sentiment, length:target=20, regex:pattern=..., and against
        # the prompts' field `answer` exact_match, math; or package.module:function(prompts, completions, **fields).
        components=("learned",),
        weights=(1.0,),  # one a component; 0: measured only
        normalise="none",  # of each component before it is added: none, batch, group
        clip=(),  # then each is kept within +-this, one a component, 0: no bound; empty: none has one
        timeout_seconds=60.0,  # of a function, a batch
        failure_score=0.0,  # of a completion that a function could not score
    )
    config.gold = "sentiment"  # a rule of rewards/rules.py that is measured, never trained on; empty: none
    config.preferences = dict(
        num_pairs=512,
        batch_size=32,  # prompts; two completions each
        labeller="",  # a judge in the place of gold, such as judge:path=org/name,template=true (rewards/models)
        coin_scale=5.0,  # P(the first is chosen) = sigmoid(coin_scale * difference in gold)
        # Of other feedback than pairs, made for reward_model.kind from as many samples with as much noise.
        ranking_size=4,  # completions a ranking
        accept_above=0.0,  # gold reward of a completion that is accepted half of the time
        aspects=("sentiment", "length:target=12", "length:target=4"),  # that multi_objective has rated
        missing_ratings=0.2,  # fraction of those that is left out
    )
    config.sft = stage(steps=60, batch_size=16, learning_rate=1e-4)
    # Length in tokens of the rows into which examples are packed; batch_size then counts rows. 0: no packing.
    config.sft.packed_tokens = 0
    config.reward_model = stage(steps=64, batch_size=8, learning_rate=3e-4)
    config.reward_model.update(
        # pairwise, token_level (a value at every token), ranking (K ways), classification (accepted or not), regression
        # (a rating), multi_objective (several, and a gate that weighs them): training/algorithms/reward_models.py. Not
        # decoders, with a tokenizer of their own: encoder, pairrm, steamshp (training/algorithms/text_rewards.py).
        kind="pairwise",
        loss="logsigmoid",  # of pairs; or logexp
        center_coeff=0.01,  # of pairs and rankings: pulls the mean of chosen and rejected to 0
        margin_coeff=0.0,  # of pairs: score that a unit of difference in their ratings asks for
        label_smoothing=0.0,  # of pairs and classification: the chance that a label is wrong
        classification_reward="logit",  # or probability, of being accepted
        huber_delta=0.0,  # of regression: deviations of the ratings at which the square turns linear; 0: nowhere
        aspects=(),  # of ratings: names of those to learn; empty: all
        ranking_loss="plackett_luce",  # or pairs: all of a ranking
        gate_steps=64,  # of multi_objective, as all that follows
        gate_learning_rate=1e-3,
        gate_width=64,  # of its hidden layers
        gate_layers=1,
        gate_temperature=10.0,  # of the softmax over aspects
        gate_preferences="",  # pairs; empty: what the stage `preferences` made, or pairs of the ratings
        verbosity="tokens",  # what every aspect is freed of: the number of tokens, an aspect, or nothing
        decorrelation="spearman",  # or pearson: the correlation with it that vanishes
        backbone="tiny",  # of encoder, pairrm and steamshp, trained whole: self-made, a hub id, or a directory
        backbone_learning_rate=1e-5,  # of these, in the place of optimizer.learning_rate
        objective="pairwise",  # of encoder: or classification, regression
        encoder_pooling="cls",  # the head reads the state at the first token; mean: the mean of all
        members=1,  # of an ensemble: as many reward models of other seeds
        combine="mean_std",  # their scores: mean - spread_coeff * deviation; or mean_variance, worst
        spread_coeff=1.0,
        layers=0,  # of the base that it uses, from the first; 0: all
        pooling="last",  # the head reads the state at the end token; mean: the mean state of the completion
    )
    # Judges the reward model before RL trusts it. An interval is one of 95%, by bootstrap over prompts.
    config.gate = dict(
        on_refusal="stop",  # the run ends with exit status 3, all saved; or warn: it says so and goes on
        batch_size=32,  # pairs
        max_pairs=1024,  # held-out pairs that are scored; and as many training pairs
        preview_prompts=16,  # whose samples show what the best of n would be; 0: no preview
        preview_completions=16,  # a prompt
        bootstrap_samples=2000,
        min_pairs=30,  # held-out pairs; with fewer nothing is refused
        min_accuracy=0.55,  # of held-out pairs; refuses if the whole interval is below
        warn_accuracy_gap=0.1,  # training minus held-out accuracy
        refuse_accuracy_gap=0.2,  # if the whole interval is above, and the held-out loss surely above a coin's
        warn_loss_gap=0.25,  # nats, held-out minus training loss
        refuse_loss_gap=0.5,  # nats, likewise
        memorised_loss=0.05,  # nats; below, training pairs are known by heart
        warn_ece=0.1,  # calibration error, in probability, beyond what comes by chance
        refuse_ece=0.25,
        warn_saturation=0.5,  # of held-out pairs with a probability beyond 0.99 or below 0.01
        warn_spread=0.1,  # of the variance of scores that lies between answers to one prompt
        refuse_spread=0.01,
        warn_length_correlation=0.6,  # rank correlation of score and length within pairs
        refuse_length_correlation=0.9,  # of a model that is no better than the rule "the longer one wins"
        warn_length_growth=1.5,  # length of the best of n over the mean length, or the inverse
        warn_seen=0.05,  # of held-out pairs that are among the training pairs
        significance=2.0,  # standard errors that make a change of the true reward real
    )
    config.ppo = stage(steps=16, batch_size=16, learning_rate=5e-4)
    config.ppo.update(
        num_completions=4,  # a prompt
        rollout_epochs=2,  # passes over one rollout
        num_minibatches=2,  # updates a pass
        # Nats a token between the policy and the one that sampled, past which a step makes no more updates; 0: none.
        stop_approx_kl=0.0,
        # The decoder reads the completions of a prompt one after the other, in as few rows as hold them, in the place
        # of one padded row each; what is computed is the same. Waits for their lengths, and compiles for each shape.
        pack_completions=False,
        # Whose states the value head reads: the policy's (shared), those of an adapter or weights of its own (own), or
        # of a copy of the reward model (reward).
        value="shared",
        reward_reference_batches=2,  # rollouts of the reference over which rewards get mean 0 and deviation 1
        kl_coeff=0.05,  # reward units a nat of KL(policy || reference); 0: no reference log-probabilities
        # k1, k2, k3, or exact: over the whole vocabulary, for one more forward of the policy. As a reward, k1 and exact
        # have the gradient of KL; k2 and k3 do not, and near the reference hardly pull at all.
        kl_kind="k1",
        kl_control="fixed",  # kl_coeff stays; or it moves: adaptive (Ziegler et al.), budget (ends at the target)
        kl_target=0.0,  # nats a completion, of adaptive and budget
        kl_horizon=10000.0,  # completions over which adaptive answers an error of 1
        kl_budget_rate=0.1,  # of dual ascent on the log of kl_coeff, a step; a rate that decays to 0 answers it late
        gamma=1.0,
        gae_lambda=0.95,  # 1: Monte Carlo returns
        clip_epsilon=0.2,
        clip_epsilon_high=0.0,  # half-width above a ratio of 1; 0: clip_epsilon, as below it
        dual_clip=0.0,  # cap on the ratio where the advantage is negative; 0: none
        value_loss="clipped",  # around the old values; or squared, huber
        value_clip=0.2,  # reward units; of huber, the error at which it turns linear
        value_coeff=0.1,
        entropy_coeff=0.0,
        whiten_rewards=False,  # without shifting their mean
        whiten_advantages=True,
        reward_clip=0.0,  # 0: none
        missing_eos_rule="none",  # for a completion without an end token: none, penalty (subtracted), replace
        missing_eos_value=0.0,
        # DAPO's soft penalty: subtracted in full from a completion of data.completion_tokens, in proportion within the
        # last so many tokens. 0: none.
        overlong_buffer_tokens=0,
        overlong_penalty=1.0,  # reward units
    )
    config.evaluation = dict(
        batch_size=32,  # prompts
        num_completions=4,  # a prompt; the first goes into the side-by-side files
        temperature=1.0,  # 0 is greedy
        num_beams=1,  # 1 samples; more: the best num_completions beams, at temperature 1 and with no filter
        length_penalty=1.0,  # of beams: their log-probability over length**length_penalty ranks them
        best_of=1,  # samples for each completion of the tuned side, of which the one with the highest reward counts
        max_kl=10.0,  # nats a completion; the report warns above it
    )
    config.logging = dict(
        log_every_steps=1,
        save_every_steps=8,
        samples_every_steps=4,
        num_samples=4,
        keep_latest=2,
        keep_best=1,
        # Of several processes: one that does not move for 10 times its longest step, at least so long, ends the run.
        watchdog_seconds=300.0,
        wandb_project="",  # of Weights & Biases; empty: metrics.jsonl and TensorBoard only
        tags=dict(
            sft={}, reward_model={}, ppo={}
        ),  # stage -> metric name -> another name to log it under as well
    )
    SIZES[size](config)
    return config


def stage(*, steps, batch_size, learning_rate) -> config_dict.ConfigDict:
    """The keys of every training stage."""
    return config_dict.ConfigDict(
        dict(
            steps=steps,
            batch_size=batch_size,  # prompts
            num_microbatches=1,  # pieces of a batch (or minibatch) whose gradients are summed
            train="lora",  # or full
            eval_every_steps=0,  # 0: SFT and reward model at the end only; RL never, the stage `evaluation` follows
            optimizer=dict(
                learning_rate=learning_rate,
                schedule="linear",  # to 0; or cosine, constant
                warmup_steps=0,
                b1=0.9,
                b2=0.999,
                eps=1e-5,
                weight_decay=0.0,
                clip_norm=1.0,
                head_multiplier=1.0,  # times the learning rate, for reward and value heads
            ),
        )
    )


OFFLINE = ("steps", "batch_size", "num_microbatches", "train", "eval_every_steps", "optimizer")
ONLINE = (*OFFLINE, "num_completions", "rollout_epochs", "num_minibatches", "stop_approx_kl", "pack_completions",
          "reward_reference_batches", "kl_coeff", "kl_kind", "kl_control", "kl_target", "kl_horizon",
          "kl_budget_rate", "entropy_coeff", "reward_clip", "missing_eos_rule", "missing_eos_value",
          "overlong_buffer_tokens", "overlong_penalty")  # fmt: skip

REFERENCE = dict(
    reference="base",  # scored at each step; or cached: its log-probabilities are computed once, before the first step
    reference_sync_steps=0,  # TR-DPO (arXiv:2404.09656): it moves to the policy each so many steps; 0: never
    reference_sync_mix=0.6,  # of the policy in the reference then; 1: a copy of the policy
)


def instead_of(config, old: str, name: str, shared: tuple[str, ...], **own) -> None:
    """config.NAME in the place of config.OLD, with its values of the keys that both have, and keys of its own."""
    section = config_dict.ConfigDict({key: config[old][key] for key in shared})
    section.update(own)
    del config[old], config.logging.tags[old]
    config[name], config.logging.tags[name] = section, {}


def from_preferences(size: str, name: str, **own) -> config_dict.ConfigDict:
    """A config that tunes the policy on preferences themselves."""
    config = get_config(size)
    del config.ppo, config.logging.tags.ppo
    instead_of(config, "reward_model", name, OFFLINE, **own)
    # A tenth of a reward model's rate: at more the policy leaves the reference without getting better.
    config[name].optimizer.learning_rate *= 0.1
    config.stages = (*first_stages(size), name, "evaluation")
    return config


def from_reward(size: str, name: str, **own) -> config_dict.ConfigDict:
    """A config that tunes the policy on rewards of its own samples."""
    config = get_config(size)
    instead_of(config, "ppo", name, ONLINE, **own)
    config.stages = (*first_stages(size), "reward_model", "gate", name, "evaluation")
    return config


# Of rows whose completions are judged against their group.
GROUPS = dict(
    mask_truncated=False,  # completions without an end token are judged, but not trained on
    max_refills=0,  # rollouts of other prompts a step may draw in the place of groups of equal rewards; 0: none
)


def in_groups(config, name: str, num_completions: int) -> None:
    """As many completions a step as before, `num_completions` to each prompt."""
    section = config[name]
    total = section.batch_size * section.num_completions
    section.update(batch_size=total // num_completions, num_completions=num_completions, num_microbatches=1)


def first_stages(size: str) -> tuple[str, ...]:
    """What comes before learning: the self-made base of tiny knows nothing until it is taught."""
    return ("sft", "preferences") if size == "tiny" else ("preferences",)


def tiny(config):
    """Two layers, self-made weights and tokenizer, taught a small grammar by SFT: seconds on a laptop CPU."""
    config.data.update(prompt_tokens=16, completion_tokens=12, held_out_prompts=64, held_out_pairs=128)
    config.model.remat = "none"
    config.sft.update(steps=300, batch_size=32, train="full")
    config.sft.optimizer.learning_rate = 3e-3
    config.preferences.update(num_pairs=4096, batch_size=128, coin_scale=10.0)
    config.reward_model.update(steps=192, batch_size=32, backbone_learning_rate=2e-3)
    config.reward_model.optimizer.update(learning_rate=5e-3, head_multiplier=3.0)
    config.ppo.update(steps=24, batch_size=32, num_completions=2)
    config.ppo.optimizer.learning_rate = 3e-3
    config.logging.update(log_every_steps=8, save_every_steps=16, samples_every_steps=12)


def smollm2(config):
    """SmolLM2-135M-Instruct, float32, two CPU cores and less than 6 GB."""
    config.model.remat = "none"
    # 12 of 30 layers and mean pooling: with 1,000 noisy pairs this agrees better with the gold reward than the end
    # state of the whole model, for 0.4 of its cost.
    config.reward_model.update(layers=12, pooling="mean", steps=64, batch_size=16)
    config.reward_model.optimizer.update(learning_rate=2e-3, warmup_steps=4, head_multiplier=5.0)
    config.ppo.update(steps=14, kl_coeff=0.22)
    config.ppo.optimizer.update(learning_rate=2e-3, warmup_steps=4, head_multiplier=5.0)
    config.preferences.update(num_pairs=1024, batch_size=64, coin_scale=10.0)
    config.data.held_out_pairs = 192
    config.gate.preview_prompts = 8


def llama2_7b(config):
    """LoRA on a v5e:4x4 (16 chips), or another slice: docs/plan.md. The base is split over all chips."""
    _tpu(config, "meta-llama/Llama-2-7b-hf", tensor=1)


def llama2_13b(config):
    """LoRA on a v5e:2x4 (8 chips) or more: docs/plan.md."""
    _tpu(config, "meta-llama/Llama-2-13b-hf", tensor=2)


def llama2_70b(config):
    """LoRA on a v5p:2x2x2 (8 chips), on 4 with mesh.tensor=4, on 16 of v6e: docs/plan.md. 8 key/value heads."""
    _tpu(config, "meta-llama/Llama-2-70b-hf", tensor=8)


def _tpu(config, path, *, tensor):
    config.model.update(path=path, dtype="bfloat16", param_dtype="bfloat16", remat="full", vocab_chunk=0)
    config.mesh.update(data=1, fsdp=-1, tensor=tensor)
    config.data.update(prompt_tokens=512, completion_tokens=64, length_buckets=4, sort_batches=16)
    config.preferences.update(num_pairs=8192, batch_size=64)
    config.sft.update(steps=1000, batch_size=64)
    config.reward_model.update(steps=1000, batch_size=64)
    config.reward_model.optimizer.update(learning_rate=1e-4, warmup_steps=30)
    config.ppo.update(
        steps=1000, batch_size=64, num_completions=1, rollout_epochs=4, num_minibatches=1, num_microbatches=2
    )
    config.ppo.optimizer.update(learning_rate=1e-4, warmup_steps=30)
    config.evaluation.update(batch_size=64, num_completions=1)
    config.logging.update(log_every_steps=10, save_every_steps=100, samples_every_steps=50)


SIZES = {f.__name__: f for f in (tiny, smollm2, llama2_7b, llama2_13b, llama2_70b)}
