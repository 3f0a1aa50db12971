"""One Python file from many: the parts of moe_train and moe_kernels that a model needs, in the order in which they are defined.

Statements are copied as they stand, so that the file is the training code. What is changed: imports of our own modules go away;
private names that two modules share get their module's name; the sections of the configuration, which pydantic checks where a run is
read, become plain classes that hold what config.json says, without the rules that only a run can break.
"""

import ast
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import moe_kernels
import moe_train

OURS = {"moe_train": Path(moe_train.__file__).parent, "moe_kernels": Path(moe_kernels.__file__).parent}
SECTION = ("moe_train.config.base", "Section")

# What stands for a definition whose own form needs pydantic.
REPLACED = {
    SECTION: '''class Section:
    """A group of settings: what config.json says, else the default below."""

    def __init__(self, **values: Any) -> None:
        for key, value in values.items():
            default = getattr(type(self), key, None)
            setattr(self, key, type(default)(**value) if isinstance(default, Section) and isinstance(value, dict) else value)
''',
}
REPLACED_METHODS = {
    "__pydantic_init_subclass__": '''    def __init_subclass__(cls) -> None:
        """Register the subclass by its name."""
        if "name" in vars(cls):
            RouterConfig.registry[cls.name] = cls
''',
}
NEEDED = {SECTION: {"Any": "typing.Any"}}  # names of others that a replacement uses

Key = tuple[str, str]  # module, name


@dataclass
class Source:
    """One module of ours."""

    name: str
    imported: dict[str, Key] = field(default_factory=dict)  # local name -> ours
    outside: dict[str, str] = field(default_factory=dict)  # local name -> dotted name of somebody else's
    defined: dict[str, ast.stmt] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._import(node)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.defined[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self.defined |= {name.id: node for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}

    @cached_property
    def path(self) -> Path:
        """Its file."""
        package, *rest = self.name.split(".")
        path = OURS[package].joinpath(*rest)
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    @cached_property
    def text(self) -> str:
        """Its code."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax."""
        return ast.parse(self.text)

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            local = alias.asname or alias.name.partition(".")[0]
            if isinstance(node, ast.ImportFrom) and node.module:
                if node.module.partition(".")[0] in OURS:
                    self.imported[local] = (node.module, alias.name)
                else:
                    self.outside[local] = f"{node.module}.{alias.name}"
            else:
                self.outside[local] = alias.name if alias.asname else local


@cache
def read_source(module: str) -> Source:
    """A module of ours, read once."""
    return Source(module)


class Flattener:
    """Collects definitions from roots on, then writes them down."""

    def __init__(self) -> None:
        self.needed: dict[Key, None] = {}
        self.outside: dict[str, str] = {}

    def add(self, module: str, name: str) -> None:
        """Take a definition and everything that it needs."""
        key = self.resolve(module, name)
        if key in self.needed:
            return
        self.needed[key] = None
        source = read_source(key[0])
        for local, dotted in NEEDED.get(key, {}).items():
            self._take_outside(local, dotted)
        if key in REPLACED:
            return
        for used in self._names(source, source.defined[key[1]]):
            if used in source.defined or used in source.imported:
                self.add(source.name, used)
            elif used in source.outside:
                self._take_outside(used, source.outside[used])

    def resolve(self, module: str, name: str) -> Key:
        """Where a name is defined that `module` may import from elsewhere."""
        source = read_source(module)
        if name in source.defined:
            return module, name
        if name not in source.imported:
            raise LookupError(f"{module} has no {name}")
        return self.resolve(*source.imported[name])

    def _take_outside(self, local: str, dotted: str) -> None:
        if self.outside.setdefault(local, dotted) != dotted:
            raise ValueError(f"{local} is {dotted} in one module and {self.outside[local]} in another; use one of them")

    def _is_section(self, source: Source, node: ast.stmt) -> bool:
        """Whether a class is a group of settings."""
        if not isinstance(node, ast.ClassDef):
            return False
        if (source.name, node.name) == SECTION:
            return True
        for base in node.bases:
            if isinstance(base, ast.Name) and (base.id in source.defined or base.id in source.imported):
                module, name = self.resolve(source.name, base.id)
                if self._is_section(read_source(module), read_source(module).defined[name]):
                    return True
        return False

    def _names(self, source: Source, node: ast.stmt) -> Iterator[str]:
        """Names that a statement uses, the local ones too."""
        parts: list[ast.AST] = [node]
        if isinstance(node, ast.ClassDef) and self._is_section(source, node):
            parts = [*node.decorator_list, *node.bases]
            parts += [kept for part in node.body if (kept := _kept(part)) is not None]
        for part in parts:
            for inner in ast.walk(part):
                if isinstance(inner, ast.Name):
                    yield inner.id
                elif isinstance(inner, ast.Import | ast.ImportFrom) and any(_is_ours(inner)):
                    raise ValueError(f"{source.name}: an import of our own inside of a function cannot be flattened")
                elif isinstance(inner, ast.Constant) and isinstance(inner.value, str) and inner.value.isidentifier():
                    yield inner.value  # an annotation in quotes

    def write(self, title: str) -> str:
        """The file."""
        renamed = self._renamed()
        blocks = []
        for module in self._order():
            source = read_source(module)
            chosen = [node for node in source.tree.body if any((module, name) in self.needed for name in _defines(node))]
            if chosen:
                local = {name: new for name in (*source.defined, *source.imported) if (new := self._new(module, name, renamed))}
                texts = [self._text(source, node, local) for node in chosen]
                blocks.append(f"# {'-' * 20} {module}\n\n" + _spaced(chosen, texts))
        head = f'"""{title}"""\n\nfrom __future__ import annotations\n\n{self._imports()}\n'
        return head + "\n\n" + "\n\n\n".join(blocks) + "\n"

    def _imports(self) -> str:
        """The imports of others' modules."""
        whole, parts = [], dict[str, list[str]]()
        for local, dotted in sorted(self.outside.items()):
            module, _, name = dotted.rpartition(".")
            if local == dotted:
                whole.append(f"import {dotted}")
            else:
                parts.setdefault(module, []).append(name if name == local else f"{name} as {local}")
        return "\n".join([*whole, *(f"from {module} import {', '.join(names)}" for module, names in sorted(parts.items()))])

    def _order(self) -> list[str]:
        """Modules, each after those that it imports."""
        graph: dict[str, set[str]] = {}
        for module, name in self.needed:
            source = read_source(module)
            local = {self.resolve(module, used)[0] for used in source.imported if self._wanted(module, used)}
            graph.setdefault(module, set()).update(local - {module})
            graph.setdefault(self.resolve(module, name)[0], set())
        return list(graphlib.TopologicalSorter({key: sorted(graph[key]) for key in sorted(graph)}).static_order())

    def _wanted(self, module: str, name: str) -> bool:
        try:
            return self.resolve(module, name) in self.needed
        except LookupError:
            return False  # a module itself, or a name that nothing here uses

    def _renamed(self) -> dict[Key, str]:
        """New names for those that two modules define."""
        owners: dict[str, list[str]] = {}
        for module, name in self.needed:
            owners.setdefault(name, []).append(module)
        renamed = {}
        for name, modules in owners.items():
            for module in modules if len(modules) > 1 else []:
                *_, folder, file = module.split(".")
                prefix = folder if file in ("reference", "with_torch", "op") else file
                renamed[module, name] = f"_{prefix}{name}" if name.startswith("_") else f"{prefix}_{name}"
        return renamed

    def _new(self, module: str, name: str, renamed: dict[Key, str]) -> str | None:
        """What a local name is called in the file, where that differs."""
        if not self._wanted(module, name):
            return None
        key = self.resolve(module, name)
        new = renamed.get(key, key[1])
        return None if new == name else new

    def _text(self, source: Source, node: ast.stmt, local: dict[str, str]) -> str:
        """A statement as it stands in its file, with new names; settings without what pydantic needs."""
        if isinstance(node, ast.ClassDef) and (source.name, node.name) in REPLACED:
            return REPLACED[source.name, node.name].rstrip("\n")
        lines = source.text.encode().splitlines()
        edits: dict[tuple[int, int], tuple[int, bytes]] = {}  # (line, column) -> (length, new)
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and inner.id in local:
                edits[inner.lineno, inner.col_offset] = (len(inner.id.encode()), local[inner.id].encode())
            elif isinstance(inner, ast.arg) and inner.arg in local:
                raise ValueError(f"{source.name}: the argument {inner.arg} hides a name that has to be changed")
        for (line, column), (length, new) in sorted(edits.items(), reverse=True):
            lines[line - 1] = lines[line - 1][:column] + new + lines[line - 1][column + length :]
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in local:
            at = node.lineno - 1
            lines[at] = lines[at].replace(f" {node.name}".encode(), f" {local[node.name]}".encode(), 1)
        if isinstance(node, ast.ClassDef) and self._is_section(source, node):
            _plain(node, lines)
        first, end = _span(node)
        while first > 1 and lines[first - 2].startswith(b"#"):
            first -= 1
        kept = [line.decode() for line in lines[first - 1 : end] if line != _DROPPED]
        return "\n".join(kept).rstrip()


_DROPPED = b"\0"


def _plain(node: ast.ClassDef, lines: list[bytes]) -> None:
    """Turn a section's lines into those of a plain class: defaults stay, types, rules and what has no default go."""
    body: list[ast.stmt] = node.body
    for part, after in zip(body, [*body[1:], None], strict=True):
        first, end = _span(part)
        if isinstance(part, ast.FunctionDef) and part.name in REPLACED_METHODS:
            lines[first - 1 : end] = _padded(REPLACED_METHODS[part.name], end - first + 1)
        elif _kept(part) is None:
            if isinstance(part, ast.AnnAssign) and isinstance(after, ast.Expr):  # a field's documentation
                end = _span(after)[1]
            while isinstance(part, ast.FunctionDef) and end < len(lines) and not lines[end].strip():
                end += 1
            lines[first - 1 : end] = [_DROPPED] * (end - first + 1)
        elif isinstance(part, ast.AnnAssign):
            lines[first - 1 : end] = _without_type(part, lines)


def _without_type(part: ast.AnnAssign, lines: list[bytes]) -> list[bytes]:
    """As many lines, with the assignment alone."""
    assert isinstance(part.target, ast.Name)
    assert part.value is not None
    first, end = _span(part)
    start = part.value.lineno
    value = lines[start - 1][part.value.col_offset :]
    kept = [b"    " + part.target.id.encode() + b" = " + value, *lines[start:end]]
    return kept + [_DROPPED] * (end - first + 1 - len(kept))


def _span(node: ast.stmt) -> tuple[int, int]:
    """First line, decorators included, and last one."""
    assert node.end_lineno is not None
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]), node.end_lineno


def _padded(text: str, count: int) -> list[bytes]:
    lines = text.rstrip("\n").encode().splitlines()
    if len(lines) > count:
        raise ValueError(f"a replacement has more lines than what it replaces, and would move the rest: {lines[0]!r}")
    return lines + [_DROPPED] * (count - len(lines))


def _kept(part: ast.stmt) -> ast.AST | None:
    """What of a section's statement stays and may need other definitions; None where it goes."""
    if isinstance(part, ast.FunctionDef):
        run_only = part.name.endswith("conflicts") or part.name == "leaks"
        return None if run_only or part.name in REPLACED_METHODS else part
    if isinstance(part, ast.AnnAssign):
        made = isinstance(part.value, ast.Call) and isinstance(part.value.func, ast.Name) and part.value.func.id == "Field"
        return None if made else part.value
    return part


def _defines(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return []


def _is_ours(node: ast.Import | ast.ImportFrom) -> Iterator[bool]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return (name.partition(".")[0] in OURS for name in names)


def _spaced(nodes: list[ast.stmt], texts: list[str]) -> str:
    """Two blank lines around functions and classes, none between assignments."""
    out = texts[0]
    for before, node, text in zip(nodes, nodes[1:], texts[1:], strict=False):
        blocks = isinstance(before, ast.FunctionDef | ast.ClassDef) or isinstance(node, ast.FunctionDef | ast.ClassDef)
        out += ("\n\n\n" if blocks else "\n") + text
    return out
