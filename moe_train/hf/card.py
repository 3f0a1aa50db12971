"""The model card of an exported model: how to load it, what it is and how it was trained."""

import json

from moe_train.config import Config
from moe_train.flops import count_flops
from moe_train.hf.native import Native

METRICS_FILE = "metrics.jsonl"

_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}"{remote})
```"""


def model_card(native: Native, parameters: int, class_name: str, remote: bool, folder: str, checked: str) -> str:
    """README.md of the folder named `folder`, which `checked` (a line) says was compared."""
    config = native.config
    code = "its own code, generated from the training code: `trust_remote_code=True`" if remote else "transformers' own code"
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            f"tags: [mixture-of-experts, {config.model.router.name}]",
            "---",
            "",
            f"# {folder}",
            "",
            f"A mixture-of-experts language model, exported from a checkpoint of moe_train as `{class_name}` ({code}).",
            "",
            _LOAD.format(folder=folder, remote=", trust_remote_code=True" if remote else ""),
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in _facts(native, parameters).items()),
            "",
            f"Compared with the checkpoint when it was exported: {checked}.",
            "",
            "The run that trained it:",
            "",
            "```json",
            json.dumps(_shown(config), indent=2),
            "```",
            "",
        ]
    )


def _shown(config: Config) -> dict[str, object]:
    """The sections that made the weights."""
    keys = ("model", "data", "train", "optim")
    return {key: section for key, section in config.model_dump(mode="json").items() if key in keys}


def _facts(native: Native, parameters: int) -> dict[str, str]:
    config = native.config
    model, train = config.model, config.train
    active = count_flops(model, train.seq_len).matmul_params
    tokens = native.step * train.global_batch_size * train.seq_len
    facts = {
        "parameters": f"{parameters:,}, of which a token's matrix products use {active:,}",
        "router": f"`{model.router.name}`, {model.router.top_k} of {model.num_experts} experts",
        "layers, width": f"{model.num_layers}, {model.hidden_size}",
        "trained": f"{native.step:,} of {train.steps:,} steps, {tokens:,} token places in rows of {train.seq_len}",
        "tokenizer": f"{native.tokenizer.name}, {native.tokenizer.vocab_size} of {model.vocab_size} ids",
    }
    if native.step:  # an imported model was trained on something else
        facts["data"] = _data(config.data.train)
    return facts | _evaluations(native)


def _data(train: str | list[str] | None) -> str:
    names = train if isinstance(train, list) else [train or "Python's standard library"]
    return ", ".join(f"`{name}`" for name in names)


def _evaluations(native: Native) -> dict[str, str]:
    """The newest of each split up to the checkpoint's step, where its run's metrics are still beside it."""
    file = native.path.parent.parent / METRICS_FILE
    if not file.is_file():
        return {}
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    newest = {row["split"]: row for row in rows if row.get("kind") == "eval" and row["step"] <= native.step}
    return {f"{split}, step {row['step']}": _measured(row) for split, row in newest.items()}


def _measured(row: dict[str, float]) -> str:
    return f"loss {row['loss']:.4f} nats per token, {row['bits_per_byte']:.4f} bits per byte"
