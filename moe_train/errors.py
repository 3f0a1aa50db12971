"""The one exception for a user's mistake."""


class UserError(Exception):
    """Something the user gave is wrong. The message is one line or a list of lines: the thing, its value, the rule, the remedy."""
