"""Read a run: YAML files that extend others, `section.key=value` words, and one report of everything that is wrong.

Also what every launch script does around its work: a user's mistake becomes one message, and process groups end.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from moe_train import config as tree
from moe_train import routers
from moe_train.agent import ANSWER_SECONDS, tell_mistake
from moe_train.config import Config
from moe_train.config.layout import check_layout
from moe_train.errors import UserError
from moe_train.patience import within
from moe_train.yaml_text import DEEPEST, read_yaml, short

Mapping = dict[str, Any]


LARGEST_FILE = 1 << 18  # bytes of a run file
MOST_FILES = 100  # that a run file extends
MOST_PROBLEMS = 50  # in a report


def merge(base: Mapping, over: Mapping) -> Mapping:
    """`over` on top of `base`, section by section. Another router's name drops the keys of the old router."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            if key == "router" and value.get("name", old.get("name")) != old.get("name"):
                old = {}
            value = merge(old, value)
        merged[key] = value
    return merged


def read_file(path: Path, above: tuple[Path, ...] = (), read: list[Path] | None = None) -> Mapping:
    """A run file with everything that it extends (paths relative to the file) below it.

    `above`: the files that extend this one. `read`: all files until now.
    """
    read = [] if read is None else read
    path, text = _read_text(path)
    if path in above:
        raise UserError(f"{path}: extends itself through {' -> '.join(str(p) for p in [*above, path])}; break the circle")
    read.append(path)
    if len(read) > MOST_FILES:
        raise UserError(f"{read[0]}: extends more than {MOST_FILES} files, the last one {path}; join some of them")
    content = read_yaml(text, str(path))
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; a run file is a mapping of sections")
    parents = content.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise UserError(f"{path}: extends={short(parents)}: must be a path or a list of paths")
    merged: Mapping = {}
    for parent in parents:
        merged = merge(merged, read_file(path.parent / parent, (*above, path), read))
    return merge(merged, content)


def _read_text(path: Path) -> tuple[Path, str]:
    """The absolute path of a run file and its text."""
    try:
        path = path.resolve()
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
        if len(raw) > LARGEST_FILE:
            raise ValueError(f"it has more than {LARGEST_FILE} bytes")
        return path, raw.decode("utf-8")
    except (OSError, ValueError, RuntimeError) as error:  # links in a circle are a RuntimeError
        raise UserError(f"{path}: cannot be read as a run file: {getattr(error, 'strerror', None) or error}") from None


def read_override(word: str) -> Mapping:
    """`a.b.c=value` as nested mappings; the value is YAML."""
    path, equals, value = word.partition("=")
    keys = path.split(".")
    if not equals or not all(keys) or len(keys) > DEEPEST:
        raise UserError(f"{short(word)}: not understood; an override is section.key=value")
    nested: Any = read_yaml(value, f"the value of {path}")
    for key in reversed(keys):
        nested = {key: nested}
    return nested


def load_run(
    path: Path | str, overrides: list[str] | tuple[str, ...] = (), complete: Callable[[Mapping], Mapping] = dict
) -> Config:
    """The run of file `path` with `overrides`, to which `complete` may add. Raises UserError listing every problem."""
    content = read_file(Path(path))
    for word in overrides:
        content = merge(content, read_override(word))
    return parse(complete(content), str(path))


def parse(content: Mapping, where: str) -> Config:
    """A mapping as a Config. Raises UserError with every invalid key and every conflict between valid ones."""
    tree.build_schema()
    problems: list[str] = []
    items, bad_paths, config = [], [], None
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        items = error.errors()
        bad_paths = [_path(item) for item in items]
        problems = [_describe(item, path, content) for item, path in zip(items[:MOST_PROBLEMS], bad_paths, strict=False)]
    if config is None:  # rules between the keys that are valid can be checked all the same
        config = _without(content, bad_paths)
    if config is not None:
        problems += [str(c) for c in config.conflicts() if not any(_related(c.path, bad) for bad in bad_paths)]
    if problems or config is None:
        rest = max(len(items) - MOST_PROBLEMS, 0)
        problems = [f"{where}: {len(problems) + rest} problem(s)", *(f"  {p}" for p in problems)]
        raise UserError("\n".join(problems + [f"  and {rest} more"] * bool(rest)))
    return config


def _related(path: str, bad: str) -> bool:
    return path == bad or path.startswith(bad + ".")


def _without(content: Mapping, paths: list[str]) -> Config | None:
    """The config with the keys at `paths` left at their defaults, or None where that is not valid either."""
    pruned = json.loads(json.dumps(content, default=str))
    for path in paths:
        *sections, last = path.split(".")
        place: Any = pruned
        for key in sections:
            place = place.get(key) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place.pop(last, None)
    try:
        return Config.model_validate(pruned)
    except ValidationError:
        return None


def _path(item: ErrorDetails) -> str:
    """The dotted key of an error; a union adds the chosen router's name after `router`, which is no key."""
    location = [str(part) for part in item["loc"]]
    if location[:2] == ["model", "router"] and len(location) > 2 and location[2] in routers.registry():
        del location[2]
    keep = len(location)
    for i, part in enumerate(location):  # branches of a union of types (int, literal['auto']) are no keys either
        if part.startswith(("literal[", "constrained-", "list[", "function-")) or part in ("int", "str"):
            keep = min(keep, i)
    return ".".join(location[:keep])


def _describe(item: ErrorDetails, path: str, content: Mapping) -> str:
    value = item["input"]
    if item["type"] == "extra_forbidden":
        return f"{path if path.isprintable() and len(path) < 80 else short(path)}: unknown key{_nearest(path, content)}"
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        names = sorted(routers.registry())
        name = value.get("name") if isinstance(value, dict) else value
        close = difflib.get_close_matches(str(name), names, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"model.router.name={short(name)}: not a router{hint} (one of {', '.join(names)})"
    return f"{path}={short(value)}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _nearest(path: str, content: Mapping) -> str:
    *parents, last = path.split(".")
    known = {key: doc for key, _, _, doc in describe_keys()}
    if parents == ["model", "router"]:
        name = content.get("model", {}).get("router", {}).get("name")
        siblings = list(routers.registry()[name].model_fields) if name in routers.registry() else []
    else:
        prefix = "".join(p + "." for p in parents)
        siblings = sorted({key[len(prefix) :].split(".")[0] for key in known if key.startswith(prefix)})
    close = difflib.get_close_matches(last, siblings, 1)
    if close:
        return f"; did you mean {'.'.join([*parents, close[0]])}?"
    if parents == ["model", "router"] and (others := [n for n, r in routers.registry().items() if last in r.model_fields]):
        return f"; a key of {', '.join(sorted(others))}, and this router is {name}, which has {', '.join(siblings)}"
    elsewhere = [key for key in known if key.endswith("." + last)]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; known here: {', '.join(siblings)}"


def dump(config: Config) -> str:
    """The config as YAML that reads back to an equal config (checked)."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    if parse(read_yaml(text, "dumped config"), "dumped config") != config:
        raise RuntimeError("the written config does not read back as it was; this is a bug in a config class")
    return text


def describe_keys() -> list[tuple[str, str, str, str]]:
    """(path, type, default, meaning) of every key."""
    rows = []
    for name, section in Config.model_fields.items():
        rows += describe_section(name, section.annotation)
    for name, router in sorted(routers.registry().items()):
        rows += [(f"model.router.{k}", t, d, f"[{name}] {doc}") for k, t, d, doc in describe_section("", router) if k != "name"]
    return rows


def describe_section(prefix: str, section: Any) -> list[tuple[str, str, str, str]]:
    """The rows of `describe_keys` for one section, whose paths start with `prefix`."""
    rows = []
    for key, field in section.model_fields.items():
        path = f"{prefix}.{key}" if prefix else key
        if path == "model.router":
            rows.append(("model.router.name", " | ".join(sorted(routers.registry())), "recurrent", "which router"))
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, tree.Section):
            rows += describe_section(path, field.annotation)
            continue
        default = "required" if field.default is PydanticUndefined else json.dumps(field.default)
        rows.append((path, _type_name(field.annotation), default, " ".join((field.description or "").split())))
    return rows


def _type_name(annotation: Any) -> str:
    """A type as a person would write it in YAML."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(inner[0])
    if origin is Literal:
        return " | ".join(str(value) for value in inner)
    if origin in (Union, UnionType):
        return " | ".join(_type_name(part) for part in inner)
    if origin is list:
        return f"list of {_type_name(inner[0])}"
    return "null" if annotation is NoneType else annotation.__name__


def usage(tool: str, what: str) -> str:
    """Text of `--help`: the call and every key."""
    lines = [what, "", f"usage: {tool} CONFIG.yaml [section.key=value ...] [--help] [--print-config] [--schema]", "", "keys:"]
    for path, kind, default, doc in describe_keys():
        lines.append(f"  {path} ({kind}; default {default})\n      {doc}")
    return "\n".join(lines)


def config_from_words(words: list[str], tool: str, what: str, complete: Callable[[Mapping], Mapping] = dict) -> Config:
    """The run that a tool's words describe. `--help`, `--print-config` and `--schema` print and exit with 0.

    `complete` adds to what the file and the words say, before it is checked. With WORLD_SIZE in the environment, `--print-config`
    checks the layout on so many ranks, too.
    """
    tree.build_schema()
    if "--help" in words or "-h" in words:
        print(usage(tool, what))
        sys.exit(0)
    if "--schema" in words:
        print(json.dumps(Config.model_json_schema(), indent=2))
        sys.exit(0)
    show = "--print-config" in words
    words = [w for w in words if w != "--print-config"]
    flags = [w for w in words if w.startswith("-")]
    if flags:
        raise UserError(f"{flags[0]}: unknown option; use section.key=value words, or --help")
    if not words or "=" in words[0]:
        raise UserError(f"{tool} needs a run file first: {tool} CONFIG.yaml [section.key=value ...]; see --help")
    config = load_run(words[0], words[1:], complete)
    if show:
        if ranks := os.environ.get("WORLD_SIZE"):
            check_layout(config, int(ranks))
        print(dump(config), end="")
        sys.exit(0)
    return config


def main(run: Callable[[list[str]], None], words: list[str]) -> None:
    """Call `run(words)`. One rank prints a UserError, without a traceback; the exit status is then 2."""
    import torch.distributed as dist

    from moe_kernels import KernelError

    rank = os.environ.get("RANK", "0")
    logging.basicConfig(level=logging.INFO if rank == "0" else logging.WARNING, format="%(message)s")
    status = 0
    try:
        run(words)
    except (UserError, KernelError) as error:
        if _mistakes(1, default=int(rank) + 1) == 1:
            print(f"error: {error}", file=sys.stderr, flush=True)
        tell_mistake()
        status = 2
    except Exception:
        if not _mistakes(0, default=0):
            raise
        status = 2  # another rank has ended with a mistake that it has told, and this one lost its connection to it
    if dist.is_available() and dist.is_initialized():
        _leave_group(failed=status != 0)
    sys.exit(status)


def _leave_group(failed: bool) -> None:
    """End this rank's part in the process group. Where it has failed the others may be in a collective: nothing waits for them."""
    import torch.distributed as dist

    if failed:
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()  # NCCL's waits for what is under way, on all ranks


def _mistakes(more: int, default: int) -> int:
    """How many ranks have met a mistake, after adding `more`; `default` where there are no others or they cannot be asked."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return default
    found = within(ANSWER_SECONDS, lambda: int(dist.distributed_c10d._get_default_store().add("mistakes", more)))
    return default if found is None else found  # the rank that held the store has ended, or hangs
