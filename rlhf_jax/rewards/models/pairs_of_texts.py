"""Texts to the ids that encoders and T5 read, through the tokenizer of their checkpoint.

Nothing in a text becomes a special token: a completion that says [SEP] or a PairRM marker says it in letters."""

import hashlib
import json

from rlhf_jax.checkpoints import huggingface
from rlhf_jax.data.formats import readable
from rlhf_jax.errors import InputError


class SequenceTokenizer:
    """A fast tokenizer of transformers with its own special tokens around one text or two."""

    def __init__(self, path: str):
        """Raises: InputError if there is no tokenizer, or it has no pad token."""
        from tokenizers import Tokenizer
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(huggingface.resolve(path), trust_remote_code=False)
            source = json.loads(found.backend_tokenizer.to_str())
        except InputError:
            raise
        except Exception as error:  # of many classes: missing files, damaged JSON, no fast form
            reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
            raise InputError(f"No tokenizer at {path} ({type(error).__name__}: {reason}).") from error
        if found.pad_token_id is None:
            raise InputError(f"{path}: the tokenizer has no pad token.")
        self.source = found  # to be saved beside weights
        self.fingerprint = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
        self._backend = Tokenizer.from_str(json.dumps(source | {"truncation": None, "padding": None}))
        self._backend.encode_special_tokens = True
        self.pad_id, self.eos_id, self.cls_id, self.sep_id = (
            found.pad_token_id, found.eos_token_id, found.cls_token_id, found.sep_token_id
        )  # fmt: skip
        self._with_types = "token_type_ids" in found.model_input_names
        self._special = self._backend.num_special_tokens_to_add(True)

    def plain(self, text: str) -> list[int]:
        """Ids of a text, nothing around it."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def pair(self, prompt, completion: str, max_tokens: int) -> tuple[list[int], list[int]]:
        """(ids, type ids) of prompt and completion as the checkpoint's template joins them.

        The beginning of a long prompt is cut, then the end of a long completion, which keeps half the room.
        """
        first, second = (
            self._backend.encode(text, add_special_tokens=False) for text in (readable(prompt), completion)
        )
        room = max_tokens - self._special
        second.truncate(max(room // 2, room - len(first)))
        first.truncate(room - len(second), direction="left")
        joined = self._backend.post_process(first, second, True)
        return joined.ids, joined.type_ids if self._with_types else [0] * len(joined.ids)
