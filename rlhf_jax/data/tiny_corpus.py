"""Sentences with good, plain and bad endings for the packaged openings: what a tiny model can learn in seconds.

Deterministic in its seed. Knows no tokens."""

import random

SUBJECTS = (
    "the room", "the food", "the staff", "the story", "the music", "the screen", "the price", "the view",
    "the people there", "the service", "the whole day", "the ending", "the first part", "the sound", "the idea",
)  # fmt: skip
VERBS = ("was", "felt", "seemed", "looked", "turned out", "stayed")
DEGREES = ("", "very ", "rather ", "really ", "a little ", "quite ")
GOOD = (
    "good", "lovely", "wonderful", "great", "happy", "brilliant", "friendly", "beautiful", "perfect", "excellent",
)  # fmt: skip
PLAIN = (
    "long", "short", "red", "early", "late", "small", "large", "quiet", "square", "open", "grey", "round",
)  # fmt: skip
BAD = ("bad", "awful", "terrible", "sad", "dirty", "boring", "rude", "horrible", "broken", "ugly")
CLOSERS = ("and we {} it", "and i {} that", "so they {} us", "and everyone {} it")
GOOD_VERBS = ("loved", "enjoyed", "praised")
PLAIN_VERBS = ("saw", "took", "counted")
BAD_VERBS = ("hated", "feared", "blamed")
MOODS = (GOOD, GOOD_VERBS), *[(PLAIN, PLAIN_VERBS)] * 3, (BAD, BAD_VERBS)


def continuations(openings: list[str], *, per_opening: int = 4, seed: int = 0) -> list[tuple[str, str]]:
    """(opening, continuation) pairs; the mood of each is drawn anew, a fifth good, three fifths plain, a fifth bad."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(per_opening):
        for opening in openings:
            words, verbs = rng.choice(MOODS)
            text = f" {rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(DEGREES)}{rng.choice(words)}"
            if rng.random() < 0.5:
                text += " " + rng.choice(CLOSERS).format(rng.choice(verbs))
            pairs.append((opening, text + "."))
    return pairs
