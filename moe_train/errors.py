"""The one exception for a user's mistake."""

import re

_LONGEST = 1000  # characters of a line; a value from a file may have millions


class UserError(Exception):
    """Something the user gave is wrong. The message is one line or a list of lines: the thing, its value, the rule, the remedy."""

    def __str__(self) -> str:
        """The message as a terminal may show it: what came from a file cannot move its cursor or fill it."""
        lines = re.split(r"\n(?=  )", super().__str__())  # a list is indented; another line break came from a value
        return "\n".join(map(_shown, lines))


def _shown(line: str) -> str:
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
