"""What a config calls a reward -> the function: a rule that ships, or the user's own by import path.

    sentiment                       a rule
    length:target=50,unit=words     a rule with parameters
    decoder:path=org/name           a model of its own (models/catalogue.py)
    package.module:function         the user's own score(prompts, completions, **fields)

A comma ends a value only where NAME= follows, so a pattern may hold commas, colons and equals signs:
regex:pattern=[0-9]{1,3},match=full (a pattern with ",x=" in it writes "[,]x="). Knows nothing of processes."""

import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import re
from collections.abc import Callable

from rlhf_jax.errors import InputError
from rlhf_jax.rewards import rules
from rlhf_jax.rewards.models.catalogue import MODELS


@dataclasses.dataclass(frozen=True)
class Shipped:
    """`factory(**parameters)` gives the score; `in_process`: it can neither hang nor die."""

    factory: Callable
    in_process: bool


SHIPPED = {
    "sentiment": Shipped(lambda: rules.sentiment, in_process=True),
    "length": Shipped(rules.length, in_process=True),
    "exact_match": Shipped(rules.exact_match, in_process=True),
    "regex": Shipped(rules.regex, in_process=False),
    "math": Shipped(rules.math, in_process=False),
}
IMPORT_PATH = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<function>[^\W\d]\w*)")
KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Spec:
    """A reward by name. `load()` gives score(...), and is the first to import anything of the user's."""

    text: str  # as it stood in the config; parse(text) gives this Spec again
    name: str  # short, for messages and metrics
    load: Callable[[], Callable]
    in_process: bool
    model: bool = False  # load(mesh=...) gives a TextReward, after it has read a checkpoint


def parse(text: str) -> Spec:
    """Reads a spec (see above) and checks its parameters; the user's module is not imported yet.

    Raises: InputError for an unknown rule, a parameter that is unknown, missing, repeated or out of range, or a
      package that the rule needs and is not installed.
    """
    name, colon, rest = text.partition(":")
    if name in SHIPPED:
        shipped = SHIPPED[name]
        score = shipped.factory(**_parameters(text, name, shipped.factory, rest if colon else None))
        return Spec(text, name, lambda: score, shipped.in_process)
    if name in MODELS:
        parameters = _parameters(text, name, MODELS[name], rest if colon else None)
        return Spec(text, name, functools.partial(MODELS[name], **parameters), in_process=True, model=True)
    path = IMPORT_PATH.fullmatch(text)
    if path is None:
        near = difflib.get_close_matches(name, [*SHIPPED, *MODELS], n=1)
        raise InputError(
            f"reward {text!r} is neither a rule, a model nor an import path. Rules: {', '.join(SHIPPED)}; models: "
            f"{', '.join(MODELS)}"
            + (f" (did you mean {near[0]!r}?)" if near else "")
            + "; parameters follow as 'length:target=50'. A function of your own is 'package.module:function'."
        )
    return Spec(text, path["function"], lambda: _imported(**path.groupdict()), in_process=False)


def _imported(module: str, function: str) -> Callable:
    found = getattr(importlib.import_module(module), function, None)
    if not callable(found):
        raise TypeError(f"module {module} has no function {function!r}")
    return found


def _parameters(spec: str, name: str, factory: Callable, text: str | None) -> dict:
    known = inspect.signature(factory).parameters
    known = {
        key: one for key, one in known.items() if one.kind is not one.KEYWORD_ONLY
    }  # those are the run's
    expected = f"Parameters of {name}: {', '.join(known) or 'none'}."
    values = {}
    for part in [] if text is None else re.split(r",(?=[a-z_]+=)", text):
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            raise InputError(f"reward {spec!r}: {part!r} is not NAME=VALUE of a parameter it has. {expected}")
        if key in values:
            raise InputError(f"reward {spec!r}: {key} is given twice. Keep one.")
        values[key] = _value(spec, key, value, known[key].annotation)
    missing = [key for key, one in known.items() if one.default is one.empty and key not in values]
    if missing:
        raise InputError(
            f"reward {spec!r}: {missing[0]} is missing, as in '{name}:{missing[0]}=...'. {expected}"
        )
    return values


def _value(spec: str, key: str, text: str, kind: type):
    """`text` as the type that the factory's annotation asks for."""
    if kind is str:
        return text
    try:
        value = {"true": True, "false": False}[text] if kind is bool else kind(text)
        if math.isfinite(value):
            return value
    except (KeyError, ValueError):
        pass
    raise InputError(f"reward {spec!r}: {key} is {text!r}; expected {KINDS[kind]}.")
