"""Text to token ids and back, around a fast Hugging Face tokenizer.

Two rules hold whatever the tokenizer: text from a user or a data set never becomes a special token, and the
ids of a prompt followed by those of its completion are the ids of one text, no space lost or added between
them. Knows nothing of models, batches or masks: masks come from lengths, so a pad id equal to an end id
harms nothing.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence

from rlhf_jax.errors import InputError

OVERFLOW = ("truncate_left", "error", "drop")


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer with its special ids settled. Made by `wrap` or `load_tokenizer`."""

    tokenizer: object  # of transformers: the chat template, and what an export writes
    pad_id: int
    eos_ids: tuple[int, ...]  # any of them ends a completion; the first is appended to training texts
    prefix_ids: tuple[int, ...]  # what the tokenizer puts before a text: (bos,) or nothing
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter, compare=False)
    # truncated_prompts, dropped_prompts, truncated_completions: what the encode functions had to do so far.

    def encode_prompt(
        self, prompt: str | list[dict], max_tokens: int | None = None, overflow: str = "truncate_left"
    ) -> list[int] | None:
        """Ids of a text, with BOS if this tokenizer adds one, or of messages through the chat template.

        Args:
          prompt: text, or [{"role": ..., "content": ...}], after which the template opens a new turn.
          max_tokens: None for no limit.
          overflow: what to do with a longer prompt: "truncate_left" keeps the BOS and the end, "error" raises
            InputError, "drop" returns None. `counts` says how often.
        """
        if overflow not in OVERFLOW:
            raise InputError(f"overflow is {overflow!r}; expected one of {', '.join(OVERFLOW)}.")
        if isinstance(prompt, str):
            ids = [*self.prefix_ids, *self._plain(prompt, start=True)]
        else:
            ids = self._conversation(prompt)
        if len(ids) == 0:
            raise InputError(f"The prompt {_shown(prompt)} has no tokens. Delete it from the data.")
        if max_tokens is None or len(ids) <= max_tokens:
            return ids
        if overflow == "error":
            raise InputError(
                f"The prompt {_shown(prompt)} has {len(ids)} tokens, more than {max_tokens}. Shorten it, "
                'raise the prompt length, or choose overflow "truncate_left" or "drop".'
            )
        if overflow == "drop":
            self.counts["dropped_prompts"] += 1
            return None
        head = list(self.prefix_ids) if ids[: len(self.prefix_ids)] == list(self.prefix_ids) else []
        if max_tokens <= len(head):
            raise InputError(f"A prompt of {max_tokens} tokens has no room for text; allow more.")
        self.counts["truncated_prompts"] += 1
        return head + ids[len(ids) - (max_tokens - len(head)) :]

    def encode_completion(
        self,
        text: str,
        max_tokens: int | None = None,
        add_eos: bool = True,
        allow_truncation: bool = False,
    ) -> list[int]:
        """Ids of a text that continues a prompt: no BOS, a leading space kept, none invented; then EOS.

        A text longer than `max_tokens`, its EOS counted, is an InputError. With `allow_truncation` it is cut
        on the right and has no EOS, since it does not end there, and `counts["truncated_completions"]` goes
        up.
        """
        ids = self._plain(text, start=False)
        if add_eos:
            ids = [*ids, self.eos_ids[0]]
        if max_tokens is None or len(ids) <= max_tokens:
            return ids
        if not allow_truncation:
            raise InputError(
                f"The completion {_shown(text)} has {len(ids)} tokens, more than {max_tokens}. Shorten it, "
                "raise the completion length, or allow truncation."
            )
        self.counts["truncated_completions"] += 1
        return ids[:max_tokens]

    def encode_text(self, text: str) -> list[int]:
        """Ids of a whole text: BOS if this tokenizer adds one, the text, EOS."""
        return [*self.prefix_ids, *self._plain(text, start=True), self.eos_ids[0]]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of a whole sequence, prompt included."""
        return self._backend(True).decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def decode_completion(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ids that follow a prompt, a leading space included.

        `decode` takes the first space of a text for the tokenizer's own where each word has one (Llama 2).
        """
        anchor = self._anchor
        return self.decode([*anchor, *ids], skip_special)[len(self.decode(anchor)) :]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that decides which ids a text gets."""
        parts = [self._backend(True).to_str(), self.tokenizer.chat_template]
        parts += [self.pad_id, self.eos_ids, self.prefix_ids]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @functools.cached_property
    def vocabulary_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self._backend(True).get_vocab(with_added_tokens=True).values()) + 1

    def check_vocabulary(self, model_vocab_size: int):
        """Raises InputError if an id of this tokenizer has no row in the model's embedding.

        A larger embedding is usual: its size is often rounded up.
        """
        if self.vocabulary_size > model_vocab_size:
            raise InputError(
                f"The tokenizer has {self.vocabulary_size} tokens, the model's embedding only "
                f"{model_vocab_size} rows. Use the tokenizer that belongs to this checkpoint."
            )

    # --- how

    def _plain(self, text: str, *, start: bool) -> list[int]:
        """Ids of text in which nothing is special, at the start of a text or in the middle of one."""
        if not isinstance(text, str):
            raise InputError(f"Expected text to encode, got {_shown(text)}.")
        try:
            ids = self._backend(start).encode(text, add_special_tokens=False).ids
        except TypeError as error:  # what the Rust side says to half a character
            raise InputError(f"The text {_shown(text)} holds a lone surrogate (half a character).") from error
        found = next((i for i in ids if i in self._special), None)
        if found is None:
            return ids
        # An entry of the vocabulary itself, where SentencePiece keeps "</s>": pull it apart.
        content = self._special[found]
        pieces = text.split(content)
        if len(pieces) == 1 or len(content) < 2:
            raise InputError(
                f"The text {_shown(text)} cannot be encoded without the special token {content!r}."
            )
        ids = self._plain(pieces[0] + content[0], start=start)
        for piece in pieces[1:-1]:
            ids += self._plain(content[1:] + piece + content[0], start=False)
        return ids + self._plain(content[1:] + pieces[-1], start=False)

    def _conversation(self, messages: list[dict]) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise InputError(
                "The prompt is a list of messages, but the tokenizer has no chat template. Use a model whose "
                "tokenizer has one (an -Instruct or -chat model), or write each prompt as text."
            )
        # Each special string in a message gives way to a private-use character while the template is filled
        # in, so that those which the template writes are the only ones that the tokenizer sees as such.
        contents = "".join(message["content"] for message in messages)
        stands_for = {}
        for content in sorted(self._special.values(), key=len, reverse=True):
            if content and content in contents:
                mark = next(
                    c for c in map(chr, range(0xE000, 0xF900)) if c not in contents and c not in stands_for
                )
                stands_for[mark] = content
                messages = [{**m, "content": m["content"].replace(content, mark)} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (
            Exception
        ) as error:  # jinja2's own classes, raised by the template: roles that it does not know
            raise InputError(f"The chat template refuses {_shown(messages)}: {error}") from error
        ids, piece, start = [], "", True
        for character in [*text, None] if stands_for else ():
            if character is not None and character not in stands_for:
                piece += character
                continue
            ids += self._backend(start, specials=True).encode(piece, add_special_tokens=False).ids
            if character is not None:
                ids += self._plain(stands_for[character], start=False)
            piece, start = "", False
        return ids or self._backend(True, specials=True).encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _special(self) -> dict[int, str]:
        """What user text must never become. The unknown token may be: it is what unknown text becomes."""
        added = self._backend(True).get_added_tokens_decoder()
        special = {i: token.content for i, token in added.items() if token.special}
        special |= {i: self._backend(True).id_to_token(i) for i in (*self.eos_ids, *self.prefix_ids)}
        return {i: content for i, content in special.items() if i != self.tokenizer.unk_token_id}

    @functools.cached_property
    def _anchor(self) -> list[int]:
        return self._plain("a", start=True)

    def _backend(self, start: bool, specials: bool = False):
        """A copy of the Rust tokenizer, since a setting is wanted and the original belongs to others."""
        return self._backends(start, specials)

    @functools.cached_property
    def _backends(self):
        from tokenizers import Tokenizer

        source = json.loads(self.tokenizer.backend_tokenizer.to_str())

        @functools.cache
        def build(start: bool, specials: bool):
            wanted = source if start else {**source, **_without_prefix(source)}
            backend = Tokenizer.from_str(json.dumps({**wanted, "truncation": None, "padding": None}))
            backend.encode_special_tokens = not specials
            return backend

        return build


def wrap(tokenizer, eos_ids: Sequence[int] = ()) -> TextTokenizer:
    """A TextTokenizer around a fast tokenizer of transformers.

    Args:
      tokenizer: PreTrainedTokenizerFast or a class derived from it.
      eos_ids: further ids that end a completion: `eos_token_id` of the checkpoint's generation_config.json or
        config.json, which may list several. The tokenizer's own is always among the result, and first.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            "The tokenizer has no tokenizer.json form. Convert it with transformers' save_pretrained."
        )
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    eos_ids = tuple(dict.fromkeys([*own, *map(int, eos_ids)]))
    if not eos_ids:
        raise InputError(
            "The tokenizer has no end-of-sequence token, so no completion could ever end. Name one."
        )
    for i in eos_ids:
        if tokenizer.backend_tokenizer.id_to_token(i) is None:
            raise InputError(f"The end-of-sequence id {i} is not an id of the tokenizer.")
    encode = functools.partial(tokenizer.backend_tokenizer.encode, "a")
    whole, bare = encode(add_special_tokens=True).ids, encode(add_special_tokens=False).ids
    starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
    prefix_ids = tuple(whole[: starts[-1]]) if starts and bare else ()
    # Its own pad or unknown token, else any special one, and an end token only if there is no other.
    special = [i for i in sorted(tokenizer.added_tokens_decoder) if tokenizer.added_tokens_decoder[i].special]
    wanted = [tokenizer.pad_token_id, tokenizer.unk_token_id, *special, eos_ids[0]]
    pad_id = next((i for i in wanted if i is not None and i not in eos_ids), eos_ids[0])
    return TextTokenizer(tokenizer, pad_id, eos_ids, prefix_ids)


def load_tokenizer(path_or_id: str, eos_ids: Sequence[int] = ()) -> TextTokenizer:
    """The tokenizer of a local directory or of a Hugging Face model. Never runs code that comes with it.

    Raises: InputError where there is none.
    """
    from transformers import AutoTokenizer

    path = os.path.expanduser(path_or_id)
    local = os.path.isdir(path)
    if not local and (os.path.exists(path) or path.startswith((".", os.sep)) or path.count("/") > 1):
        raise InputError(f"{path_or_id} is not a directory; expected one with a tokenizer.json.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path if local else path_or_id, trust_remote_code=False)
    except Exception as error:  # of many classes: missing files, no network, damaged JSON, code refused
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
        advice = (
            "The directory needs tokenizer.json and tokenizer_config.json."
            if local
            else "Give a local directory, or download the model where there is a network "
            "(HF_HUB_OFFLINE=1 skips the attempts to connect)."
        )
        raise InputError(
            f"No tokenizer at {path_or_id} ({type(error).__name__}: {reason}). {advice}"
        ) from error
    return wrap(tokenizer, eos_ids)


def _without_prefix(source: dict) -> dict:
    """The normalizer and pre-tokenizer of a tokenizer.json, less whatever puts a space before a text."""

    def strip(step):
        if step is None or step["type"] == "Prepend":
            return None
        for inner in ("normalizers", "pretokenizers"):
            if inner in step:
                step = {**step, inner: [kept for kept in map(strip, step[inner]) if kept is not None]}
        if "prepend_scheme" in step:
            step = {**step, "prepend_scheme": "never"}
        if "add_prefix_space" in step:
            step = {**step, "add_prefix_space": False}
        return step

    return {part: strip(source.get(part)) for part in ("normalizer", "pre_tokenizer")}


def _shown(text) -> str:
    return repr(text if not isinstance(text, str) or len(text) <= 60 else text[:57] + "...")[:200]
