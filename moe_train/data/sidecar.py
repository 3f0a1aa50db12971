"""The JSON file beside a dataset: what its ids mean. Megatron-LM ignores it, and a dataset without it can be read."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.errors import UserError

FORMAT = "moe_train.dataset"
VERSION = 1
UNKNOWN_LABEL = "unknown"


@dataclass(frozen=True)
class Sidecar:
    """What PREFIX.json says. Label i of PREFIX.labels is called `label_names[i]`; label 0 is always "unknown"."""

    tokenizer: str  # its name
    tokenizer_file: str | None  # beside this file; None when the name says everything
    fingerprint: str  # of the tokenizer
    vocab_size: int
    eod: int  # the id that ends each document
    label_names: tuple[str, ...]
    num_documents: int
    num_tokens: int
    num_bytes: int  # of text, without ends of documents
    source: str | None = None  # a fingerprint of what the dataset was made from, where the maker knows one

    def to_json(self) -> bytes:
        """Return the file's content: equal sidecars, equal bytes."""
        fields = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        return json.dumps(fields, indent=2, ensure_ascii=False).encode("utf-8", errors="surrogatepass") + b"\n"


def is_sidecar(path: Path) -> bool:
    """Say whether a file is a sidecar of ours, of any version, so that a writer may replace it."""
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and fields.get("format") == FORMAT


def read_sidecar(path: Path) -> Sidecar | None:
    """Return the sidecar, or None when there is no such file. Raises UserError when it is damaged or not ours."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"dataset sidecar {path}: {error}") from None
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"dataset sidecar {path} is no JSON ({error}); prepare the data again, or remove it") from None
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise UserError(f"{path} is not the dataset sidecar that its name promises (no format {FORMAT}); rename it")
    version = fields.pop("version", None)
    if version != VERSION:
        raise UserError(f"dataset sidecar {path} has version {version!r}, this code reads {VERSION}; prepare the data again")
    return _checked(fields, path)


def _checked(fields: dict[str, Any], path: Path) -> Sidecar:
    optional_text = (str, type(None))
    kinds: dict[str, type | tuple[type, ...]] = {
        "tokenizer": str,
        "tokenizer_file": optional_text,
        "fingerprint": str,
        "vocab_size": int,
        "eod": int,
        "label_names": list,
        "num_documents": int,
        "num_tokens": int,
        "num_bytes": int,
        "source": optional_text,
    }
    for name, kind in kinds.items():
        if not isinstance(fields.get(name, ...), kind) or isinstance(fields[name], bool):
            raise UserError(f"dataset sidecar {path}: {name} is missing or of the wrong type; prepare the data again")
    if unknown := fields.keys() - kinds.keys():
        raise UserError(f"dataset sidecar {path}: unknown key {min(unknown)!r}; prepare the data again")
    names = fields["label_names"]
    if not names or names[0] != UNKNOWN_LABEL or not all(isinstance(n, str) for n in names) or len(set(names)) < len(names):
        raise UserError(f"dataset sidecar {path}: label_names must be different names, the first one {UNKNOWN_LABEL!r}")
    if not 0 <= fields["eod"] < fields["vocab_size"]:
        raise UserError(f"dataset sidecar {path}: eod {fields['eod']} is outside vocab_size {fields['vocab_size']}")
    if (file := fields["tokenizer_file"]) is not None and Path(file).name != file:
        raise UserError(f"dataset sidecar {path}: tokenizer_file {file!r} must be a file in the same folder")
    return Sidecar(**{**fields, "label_names": tuple(names)})
