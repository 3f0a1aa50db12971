"""Convert trained models: `python launch/convert.py VERB SOURCE OUT [section.key=value ...]`.

to-hf        a checkpoint (or a run's newest) -> a folder that transformers loads
from-hf      a folder of transformers (Mixtral, OLMoE, Qwen3-MoE, dense Llama or Qwen3, or one that to-hf wrote) -> a checkpoint
upcycle      a checkpoint with dense MLPs, or one expert in each layer -> a checkpoint with experts
swap-router  a checkpoint -> the same with another router, newly drawn
modeling     ROUTER OUT: write the modeling file of exported models with that router

A checkpoint that is written here is one of step 0; a run starts from it with checkpoint.init_from=OUT. Each conversion compares the
logits of both models on real text, prints the largest difference, and writes nothing where they should be equal and are not.
"""

import json
import math
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from moe_train.cli import main
from moe_train.errors import UserError

VERBS = ("to-hf", "from-hf", "upcycle", "swap-router", "modeling")
OPTIONS = {  # which verbs know them
    "remote_code": ("to-hf",),
    "tokenizer": ("from-hf",),
    "noise": ("upcycle",),
    "tolerance": ("to-hf", "from-hf", "upcycle"),
    "memory": ("to-hf",),
}


def run(words: list[str]) -> None:
    """Convert as `words` say."""
    given = read(words)
    if given.verb in ("to-hf", "from-hf"):
        _require_transformers()
    print(f"{given.out}: {_convert(given)}")


def read(words: list[str]) -> Namespace:
    """The command line."""
    parser = ArgumentParser("launch/convert.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help=", ".join(VERBS))
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("out", type=Path, metavar="OUT", help="must not be there yet")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument(
        "--remote-code", action="store_true", help="to-hf: bring a modeling file, where transformers' own would do"
    )
    parser.add_argument(
        "--tokenizer", metavar="bytes|FILE", help="from-hf: the model's tokenizer, where the folder's cannot be read"
    )
    parser.add_argument(
        "--noise", type=float, default=0.0, help="upcycle: noise on each expert, relative to a matrix's standard deviation"
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="how far logits may differ, as a share of the largest (%(default)s)"
    )
    parser.add_argument("--memory", metavar="FILE", type=Path, help="to-hf: append a row with the peak of memory to this file")
    given = parser.parse_intermixed_args(words)
    for option, verbs in OPTIONS.items():
        if given.verb not in verbs and getattr(given, option) != parser.get_default(option):
            parser.error(f"{given.verb} takes no --{option.replace('_', '-')}")
    if not 0 <= given.noise < math.inf:
        parser.error("--noise must be a number of at least 0")
    if not 0 <= given.tolerance < 1:
        parser.error("--tolerance must be at least 0 and below 1")
    if given.verb in ("from-hf", "modeling") and given.overrides:
        parser.error(f"{given.verb} takes no overrides: {given.overrides[0]}")
    return given


def _convert(given: Namespace) -> str:
    """Do it; a line on what came out."""
    from moe_train.hf import exporting, importing, remote
    from moe_train.hf.memory import free_at_once
    from moe_train.upcycle import swap_router, upcycle

    free_at_once()
    source = Path(given.source)
    if given.verb == "to-hf" and given.memory is not None:
        return _measured(given)
    if given.verb == "to-hf":
        return str(exporting.to_hf(source, given.out, given.overrides, given.remote_code, given.tolerance))
    if given.verb == "from-hf":
        return str(importing.from_hf(source, given.out, given.tokenizer, given.tolerance))
    if given.verb == "upcycle":
        return upcycle(source, given.out, given.overrides, given.noise, given.tolerance)
    if given.verb == "swap-router":
        return swap_router(source, given.out, given.overrides)
    return f"{remote.write_modeling(given.source, given.out)} lines"


def _measured(given: Namespace) -> str:
    """Export, and record the peak of memory beside the size of the model. Libraries are not counted: they are imported before."""
    import safetensors
    import torch
    import transformers.modeling_utils

    from moe_train import benchmark
    from moe_train.hf import exporting
    from moe_train.hf.memory import peak_memory

    with peak_memory() as memory:
        difference = exporting.to_hf(Path(given.source), given.out, given.overrides, given.remote_code, given.tolerance)
    architecture = json.loads((given.out / "config.json").read_text())["architectures"][0]
    size = sum(file.stat().st_size for file in given.out.glob("*.safetensors"))
    row = {"export": architecture, "model_bytes": size, **memory, "ratio": memory["peak_bytes"] / size}
    versions = {"transformers": transformers.__version__, "safetensors": safetensors.__version__}
    benchmark.append(row | versions | benchmark.machine(torch.device("cpu")), given.memory)
    return f"{difference}; memory at most {row['ratio']:.2f} x the model's {size / 1e6:.0f} MB"


def _require_transformers() -> None:
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"transformers cannot be imported ({error}); pip install 'moe_train[hf]'") from None
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    main(run, sys.argv[1:])
