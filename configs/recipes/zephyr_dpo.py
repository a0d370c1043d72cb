"""Zephyr: Tunstall et al. 2023, "Zephyr: Direct Distillation of LM Alignment", arXiv:2310.16944.

Full fine-tuning on a teacher's dialogues, packed, then DPO on pairs that another teacher ranked.
Data: dialogues (sft) and pairs (preferences), in messages: the tokenizer needs a chat template, which that of Llama 2
without -chat has not; the paper's Mistral got one of its own (--config.model.path).
Published: MT-Bench 7.34 and AlpacaEval 90.6% for 7B. Pairs fit perfectly after one epoch of three, without harm."""

from configs import dpo
from configs.recipes import epochs, published


def get_config(size="tiny"):
    config = dpo.get_config(size)
    config.sft.packed_tokens = 32 if size == "tiny" else 2048
    config.dpo.update(loss_type="sigmoid", beta=0.1, label_smoothing=0.0, reference="cached")
    config.dpo.optimizer.update(schedule="linear", weight_decay=0.0)
    if published(
        config,
        size,
        "sft",
        "dpo",
        sft="HuggingFaceH4/ultrachat_200k#train_sft",
        prompts="HuggingFaceH4/ultrafeedback_binarized#test_prefs",
        preferences="HuggingFaceH4/ultrafeedback_binarized#train_prefs",
        eval_preferences="HuggingFaceH4/ultrafeedback_binarized#test_prefs",
        max_bad_records=0.01,
        prompt_tokens=512,
        completion_tokens=512,
    ):
        config.sft.update(train="full", steps=400, batch_size=512)  # about one pass over the packed dialogues
        config.sft.optimizer.update(learning_rate=2e-5, schedule="cosine", warmup_steps=40)
        config.dpo.update(train="full", **epochs(61_135, 3, 32))
        config.dpo.optimizer.update(learning_rate=5e-7, warmup_steps=573)
    return config
