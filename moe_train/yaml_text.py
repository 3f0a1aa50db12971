"""The YAML of run files and overrides: text that anybody may have written, read without surprises."""

from __future__ import annotations

import re
from typing import Any

import yaml

from moe_train.errors import UserError

DEEPEST = 16  # sections inside each other


class _Loader(yaml.SafeLoader):
    """What a run needs of YAML: no key twice, 1e-3 is a number and 2026-01-01 is text.

    Tags are refused, and aliases of anything but a single value: a few lines of them can stand for a billion values.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        aliased = self.check_event(yaml.AliasEvent)
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, f"the tag {event.tag} is not read; remove it", event.start_mark)
        if self.depth == DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"more than {DEEPEST} levels of nesting", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if aliased and not isinstance(node, yaml.ScalarNode):
            rule = "an alias may stand for a single value only; write the rest out, or use extends"
            raise yaml.composer.ComposerError(None, None, rule, event.start_mark)
        return node


_TYPES = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float")}
_Loader.yaml_implicit_resolvers = {
    start: [(tag, pattern) for tag, pattern in resolvers if tag in _TYPES]
    for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"the key {short(key)} is not text", node.start_mark)
        if key in content:
            raise yaml.constructor.ConstructorError(None, None, f"the key {short(key)} appears twice", node.start_mark)
        content[key] = loader.construct_object(value_node, deep=True)
    return content


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    number = int(loader.construct_yaml_int(node))
    if not -(2**63) <= number < 2**63:
        raise yaml.constructor.ConstructorError(None, None, "a whole number does not fit 64 bits", node.start_mark)
    return number


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def short(value: object) -> str:
    """A value as an error shows it."""
    shown = repr(value)
    return shown if len(shown) < 80 else shown[:77] + "..."


def read_yaml(text: str, where: str) -> Any:
    """Parse YAML; `where` names it in errors."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
