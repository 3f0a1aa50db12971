"""The word-swap attack of ACMoE's test sets: in each line, 2.5% of the words that are no stop words become `AAA`.

Nielsen et al. 2025 (arXiv:2502.15315), who take it from TextAttack (Morris et al. 2020, arXiv:2005.05909): of n words in a line,
max(int(share n), 1) are replaced.
"""

import random
import re

SWAPPED = b"AAA"
SHARE = 0.025

# English stop words of NLTK's corpus, without the pieces of contractions.
_STOP_WORDS = """
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it its itself
they them their theirs themselves what which who whom this that these those am is are was were be been being have has had
having do does did doing a an the and but if or because as until while of at by for with about against between into through
during before after above below to from up down in out on off over under again further then once here there when where why
how all any both each few more most other some such no nor not only own same so than too very can will just don should now
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())

_WORD = re.compile(rb"[^\s]+")


def swap_words(text: bytes, share: float, seed: int) -> bytes:
    """Return the text with a share of the words of each line replaced; all white space stays as it is.

    A word is what stands between white space and has a letter or a digit. Which words are hit depends on the line and the seed
    alone, so that no order of reading changes it.
    """
    return b"\n".join(_swap_line(line, share, seed) for line in text.split(b"\n"))


def _swap_line(line: bytes, share: float, seed: int) -> bytes:
    words = [match for match in _WORD.finditer(line) if any(c.isalnum() for c in _text(match[0]))]
    targets = [match for match in words if _text(match[0]).lower() not in STOP_WORDS]
    if not targets:
        return line
    count = min(max(int(share * len(words)), 1), len(targets))
    chosen = {match.start() for match in random.Random(f"{seed} {line!r}").sample(targets, count)}
    return _WORD.sub(lambda match: SWAPPED if match.start() in chosen else match[0], line)


def _text(word: bytes) -> str:
    return word.decode("utf-8", errors="replace")
