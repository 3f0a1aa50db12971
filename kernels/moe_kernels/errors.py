"""The one exception that this package raises for a caller's mistake."""


class KernelError(ValueError):
    """A wrong argument. The message names the argument, its value or shape, the rule and, where there is one, the remedy."""
