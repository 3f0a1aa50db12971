"""Exported models in transformers itself, and transformers' models here."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import TINY, write_checkpoint
from launches import launch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_train.data.tokenizer import ByteTokenizer, Tokenizer, train_sentencepiece
from moe_train.errors import UserError
from moe_train.hf import compare, exporting, remote
from moe_train.hf.exporting import to_hf
from moe_train.hf.importing import from_hf
from moe_train.hf.native import Native, logits_of, open_native
from moe_train.hf.shards import find_tensors, read_tensor
from moe_train.hf.stock import ARCHITECTURES

pytestmark = pytest.mark.integration

TOPK = {"name": "topk"}
ONE = {"name": "topk", "top_k": 1, "renormalize": False, "balance_weight": 0.0}
STOCK: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {"router": TOPK, "tie_embeddings": True},
    "Qwen3MoeForCausalLM": {"router": TOPK | {"renormalize": False, "top_k": 1}, "qk_norm": True, "moe_layer_freq": [1, 0, 1]},
    "OlmoeForCausalLM": {"router": TOPK | {"renormalize": False}, "qk_norm": "width"},
    "LlamaForCausalLM": {"router": ONE, "num_experts": 1},
    "Qwen3ForCausalLM": {"router": ONE, "num_experts": 1, "qk_norm": True, "tie_embeddings": True, "head_dim": 12},
}
# Keys of a router beside its defaults, so that more of its code is exported.
ROUTERS: dict[str, dict[str, Any]] = {
    "topk": {"name": "topk", "num_groups": 2, "scores": "sigmoid"},
    "recurrent": {"name": "recurrent", "router_size": 24},
    "vqmoe": {"name": "vqmoe", "top_k": 2, "num_codes": 7},
}
EXPORTS = [*STOCK, *remote.EXPORTABLE]
GREEDY = 64


class Export:
    """A checkpoint, its export, and both models."""

    def __init__(self, name: str, folder: Path) -> None:
        self.stock = name in STOCK
        router = ROUTERS.get(name, {"name": name})
        extra = {"shared_expert_size": 8, "num_dense_layers": 1, "qk_norm": True} if name == "recurrent" else {}
        model = STOCK[name] if self.stock else {"router": router, **extra}
        self.native: Native = write_checkpoint(folder / name, **model)
        self.folder = folder / f"{name}-hf"
        self.difference = to_hf(self.native.path, self.folder, remote_code=not self.stock)
        self.ours = self.native.build()
        self.theirs = load(self.folder, self.stock)


def load(folder: Path, stock: bool, **options: Any) -> Any:
    model, problems = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=not stock, output_loading_info=True, **{"dtype": torch.float32} | options
    )
    assert not any(problems.values()), problems
    return model.eval()


@pytest.fixture(scope="module", params=EXPORTS)
def export(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return Export(request.param, tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return Export("recurrent", tmp_path_factory.mktemp("recurrent"))


def some_tokens(rows: int = 2, length: int = 48) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(3))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert float(ours.abs().max()) > 0.05
    assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(ours.abs().max()))


def greedy(native: Native, ours: Any, prompt: Tensor) -> list[int]:
    tokens = prompt
    for _ in range(GREEDY):
        best = logits_of(ours, tokens)[:, -1, : native.tokenizer.vocab_size].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], 1)
        if int(best) == native.tokenizer.eod:
            break
    return tokens[0].tolist()


@torch.no_grad()
def test_logits_and_greedy_text_are_ours(export: Export) -> None:
    tokens = some_tokens()
    assert export.difference.within()
    assert type(export.theirs).__name__ in (*STOCK, remote.CLASS)
    assert_close(logits_of(export.ours, tokens), export.theirs(input_ids=tokens).logits)
    prompt = tokens[:1, :8]
    expected = greedy(export.native, export.ours, prompt)
    passes = []
    hook = export.theirs.register_forward_pre_hook(lambda *call: passes.append(call[2]["input_ids"].shape[1]), with_kwargs=True)
    written = export.theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=GREEDY)
    hook.remove()
    assert written[0].tolist() == expected
    assert passes == [8, *[1] * (len(expected) - 9)]  # from a cache
    assert len(set(expected[8:])) > 1


@torch.no_grad()
def test_save_pretrained_gives_the_same_folder(export: Export, tmp_path: Path) -> None:
    export.theirs.save_pretrained(tmp_path)
    first, again = export.theirs.state_dict(), load(tmp_path, export.stock).state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert sorted(find_tensors(tmp_path)) == sorted(find_tensors(export.folder))
    if not export.stock:
        assert (tmp_path / remote.FILE).read_text() == (export.folder / remote.FILE).read_text()


def test_comes_back_bitwise(export: Export, tmp_path: Path) -> None:
    assert from_hf(export.folder, tmp_path / "back").within()
    back = open_native(tmp_path / "back")
    assert back.config.model == export.native.config.model.model_copy(update=_rounded(export, back))
    assert back.tensors.keys() == export.native.tensors.keys()
    # The last step's loads, and the gate of one expert, have no place in transformers.
    lost = ("fractions", "router.weight") if export.native.config.model.num_experts == 1 else ("fractions",)
    for name, tensor in export.native.tensors.items():
        if not (export.stock and name.endswith(lost)):
            assert torch.equal(tensor.load(), back.tensors[name].load()), name


def _rounded(export: Export, back: Native) -> dict[str, Any]:
    """Keys that a stock config.json writes out where ours has a default."""
    model = back.config.model
    return {key: getattr(model, key) for key in ("head_dim", "dense_ffn_hidden_size")} if export.stock else {}


def test_nothing_in_the_folder_is_a_pickle(export: Export) -> None:
    kinds = {file.suffix for file in export.folder.iterdir()}
    assert kinds <= {".json", ".safetensors", ".md"} | (set() if export.stock else {".py"})
    card = (export.folder / "README.md").read_text()
    assert "largest difference of logits" in card
    assert ("trust_remote_code=True" in card) is not export.stock


@pytest.fixture(scope="module")
def fresh() -> dict[str, str]:
    """The modeling files as another process generates them."""
    code = "import json; from moe_train.hf.remote import *; print(json.dumps({r: modeling_code(r) for r in EXPORTABLE}))"
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_the_modeling_file_is_freshly_generated(export: Export, fresh: dict[str, str]) -> None:
    if export.stock:
        assert not list(export.folder.glob("*.py"))
    else:
        assert (export.folder / remote.FILE).read_text() == fresh[export.native.config.model.router.name]


def test_modeling_files_need_torch_and_transformers_alone(fresh: dict[str, str], tmp_path: Path) -> None:
    for router, code in fresh.items():
        (tmp_path / f"modeling_{router}.py").write_text(code)
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in ("moe_train", "moe_kernels", "pydantic", "triton"))
    names = ", ".join(f"modeling_{router}" for router in fresh)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {blocked}import {names}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_padding_changes_nothing(recurrent: Export) -> None:
    tokens = some_tokens(1, 20)
    plain = recurrent.theirs(input_ids=tokens).logits
    for left, right in ((5, 0), (0, 5)):
        padded = torch.nn.functional.pad(tokens, (left, right))
        mask = torch.nn.functional.pad(torch.ones_like(tokens), (left, right))
        logits = recurrent.theirs(input_ids=padded, attention_mask=mask).logits
        assert_close(plain, logits[:, left : left + 20])


def test_loss_is_that_of_training_and_has_gradients(recurrent: Export) -> None:
    tokens = some_tokens()
    model = recurrent.theirs
    loss = model(input_ids=tokens, labels=tokens).loss
    logits = logits_of(recurrent.ours, tokens)
    cross_entropy = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    balance = recurrent.native.config.model.router.loss_weights()["balance"]
    assert 0.5 * balance < float(loss.detach() - cross_entropy) < 10 * balance  # the mean of two layers that are near balance
    loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.zero_grad()
    assert not missing


@torch.no_grad()
def test_a_cache_gives_the_logits_of_the_whole_text(export: Export) -> None:
    """Token by token, after a prompt with padding, whatever the other rows are; and going on from a cache leaves it as it was."""
    if export.stock:
        pytest.skip("transformers' own code")
    model, tokens = export.theirs, some_tokens(2, 24)
    whole = model(input_ids=tokens).logits
    prompt = torch.stack([torch.nn.functional.pad(tokens[0, :5], (4, 0)), tokens[1, :9]])
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    first = model(input_ids=prompt, attention_mask=mask, use_cache=True)
    assert_close(whole[0, :5], first.logits[0, 4:])
    assert_close(whole[1, :9], first.logits[1])
    for _ in range(2):
        past = first.past_key_values
        for t in range(15):
            new = torch.stack([tokens[0, 5 + t], tokens[1, 9 + t]])[:, None]
            mask_now = torch.cat([mask, torch.ones(2, t + 1, dtype=torch.long)], 1) if t % 2 else None
            step = model(input_ids=new, attention_mask=mask_now, past_key_values=past)
            assert_close(whole[0, 5 + t], step.logits[0, 0])
            assert_close(whole[1, 9 + t], step.logits[1, 0])
            past = step.past_key_values
        assert first.past_key_values.get_seq_length() == 9
        assert past.get_seq_length() == 24


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2}], ids=str
)
@torch.no_grad()
def test_generate_gives_the_same_with_and_without_a_cache(recurrent: Export, options: dict[str, Any]) -> None:
    prompt, mask = some_tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    found = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        found.append(recurrent.theirs.generate(prompt, attention_mask=mask, use_cache=use_cache, max_new_tokens=24, **options))
    assert torch.equal(*found)
    assert found[0].shape[1] > 8


@torch.no_grad()
def test_generate_goes_on_from_a_cache(recurrent: Export) -> None:
    prompt, model = some_tokens(1, 8), recurrent.theirs
    whole = model.generate(prompt, do_sample=False, max_new_tokens=20)
    first = model.generate(prompt, do_sample=False, max_new_tokens=9, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 16
    more = model.generate(first.sequences, past_key_values=first.past_key_values, do_sample=False, max_new_tokens=11)
    assert torch.equal(more, whole)


def test_caches_that_do_not_fit_are_refused(recurrent: Export) -> None:
    model, tokens = recurrent.theirs, some_tokens(2, 8)
    with pytest.raises(ValueError, match=r"past_key_values: must be what this model returned .*, and is a DynamicCache"):
        model(input_ids=tokens, past_key_values=transformers.DynamicCache())
    right = torch.ones_like(tokens)
    right[0, 6:] = 0
    with pytest.raises(ValueError, match="padding comes before the text; pad left, or give use_cache=False"):
        model(input_ids=tokens, attention_mask=right, use_cache=True)
    past = model(input_ids=tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 1\]; with the cached columns it must be \[2, 9\]"):
        model(input_ids=tokens[:, :1], attention_mask=right[:, :1], past_key_values=past)
    with pytest.raises(ValueError, match="cannot be given with labels"):
        model(input_ids=tokens, labels=tokens, past_key_values=past)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(tokens[:1], assistant_model=model, max_new_tokens=4)


def test_routers_stay_in_fp32(recurrent: Export) -> None:
    model = load(recurrent.folder, False, dtype=torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert {dtype for name, dtype in kinds.items() if "router" in name} == {torch.float32}
    assert {dtype for name, dtype in kinds.items() if "router" not in name} == {torch.bfloat16}
    with torch.no_grad():
        assert model(input_ids=some_tokens()).logits.isfinite().all()


@pytest.mark.parametrize("stock", ARCHITECTURES, ids=lambda stock: stock.model_type)
def test_their_models_come_and_go_bitwise(stock: Any, tmp_path: Path) -> None:
    settings = {
        "vocab_size": 320,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    }
    if not stock.dense:
        settings |= {"num_experts": 4, "num_experts_per_tok": 2}
    if stock.has_dense_layers:
        settings |= {"moe_intermediate_size": 16, "mlp_only_layers": [1], "head_dim": 12, "norm_topk_prob": True}
    config = transformers.AutoConfig.for_model(stock.model_type, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, float(parameter.ndim == 1), 0.1)
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="--tokenizer"):
        from_hf(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    assert from_hf(tmp_path / "theirs", tmp_path / "ours", "bytes").within()
    to_hf(tmp_path / "ours", tmp_path / "again")
    before, after = find_tensors(tmp_path / "theirs"), find_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(read_tensor(name, before[name]), read_tensor(name, after[name])) for name in before)
    old, new = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "again"))
    assert {key for key in old if old[key] != new[key]} <= {"head_dim", "bos_token_id", "eos_token_id", "pad_token_id"}
    older = {key: value for key, value in old.items() if key != "rope_parameters"} | {"rope_theta": 5000.0}  # before version 5
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(older))
    from_hf(tmp_path / "theirs", tmp_path / "older", "bytes")
    assert open_native(tmp_path / "older").config.model == open_native(tmp_path / "ours").config.model


@pytest.mark.parametrize("options", [[], ["--remote-code"]], ids=["stock", "remote"])
def test_the_command_says_the_difference_and_nothing_else(options: list[str], tmp_path: Path) -> None:
    """No bars of progress, and no warning of transformers that it does not know the model."""
    native = write_checkpoint(tmp_path / "native", router=TOPK)
    calls = (
        ("to-hf", str(native.path), str(tmp_path / "hf"), *options),
        ("from-hf", str(tmp_path / "hf"), str(tmp_path / "back")),
    )
    for words in calls:
        done = launch("convert", *words)
        assert done.returncode == 0, done.stderr
        assert not [line for line in done.stderr.splitlines() if not line.startswith("kernels: ")]
        assert len(done.stdout.splitlines()) == 1
        said = re.search(r": largest difference of logits (\S+), of (\S+), on 192 tokens of real text", done.stdout)
        assert said is not None
        assert float(said[1]) <= 1e-5 * float(said[2])


def test_an_export_that_differs_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native = write_checkpoint(tmp_path / "native", router=TOPK)
    honest = exporting.names_of

    def swapped(stock: Any, name: str, experts: int) -> Any:  # queries under the name of keys would still load
        names = honest(stock, name, experts)
        return list(reversed(names)) if name == "layers.1.mlp.experts.down" else names

    monkeypatch.setattr(exporting, "names_of", swapped)
    with pytest.raises(UserError, match=r"largest difference of logits .* nothing was written"):
        to_hf(native.path, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["native"]
    assert not to_hf(native.path, tmp_path / "out", tolerance=0.9).within()


def test_an_import_that_differs_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native = write_checkpoint(tmp_path / "native", router=TOPK)
    to_hf(native.path, tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    settings["rms_norm_eps"] = 0.1
    honest = compare.their_logits
    monkeypatch.setattr("moe_train.hf.importing.read_settings", lambda folder: _normal(settings))
    monkeypatch.setattr("moe_train.hf.importing.their_logits", honest)
    with pytest.raises(UserError, match="largest difference of logits"):
        from_hf(tmp_path / "hf", tmp_path / "back")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hf", "native"]


def _normal(settings: dict[str, Any]) -> dict[str, Any]:
    kind = settings.pop("model_type")
    return dict(transformers.AutoConfig.for_model(kind, **settings).to_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 32}, "sliding_window=32"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type=linear"),
        ({"model_type": "gpt_neox"}, "model_type=gpt_neox: cannot be imported"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    native = write_checkpoint(tmp_path / "native", router=TOPK)
    to_hf(native.path, tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=re.escape(message)):
        from_hf(tmp_path / "hf", tmp_path / "back")


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    native = write_checkpoint(tmp_path / "native", router=TOPK)
    to_hf(native.path, tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    tensors = {name: read_tensor(name, file) for name, file in find_tensors(tmp_path / "hf").items()}
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    cases = {
        "no such tensor": {key: value for key, value in tensors.items() if key != name},
        "have no place": tensors | {"model.extra": torch.zeros(1)},
        r"shape \[32\], and has shape \[7\]": tensors | {"model.norm.weight": torch.zeros(7)},
    }
    for message, content in cases.items():
        exporting.write_shards(tmp_path / "hf", iter(content.items()), 1)
        with pytest.raises(UserError, match=message):
            from_hf(tmp_path / "hf", tmp_path / "back")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    for content in ({}, {"weight_map": {"a": "../other.safetensors"}}, {"weight_map": {"a": "pytorch_model.bin"}}, []):
        index.write_text(json.dumps(content))
        with pytest.raises(UserError, match="is no index of safetensors files"):
            from_hf(tmp_path / "hf", tmp_path / "back", "bytes")
    index.unlink()
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        from_hf(tmp_path / "hf", tmp_path / "back", "bytes")
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(UserError, match="pickles"):
        from_hf(tmp_path / "hf", tmp_path / "back")
    assert not (tmp_path / "back").exists()


TEXTS = ["", "def f(x):\n    return  x\t# é 中文 \U0001f9ff\r\n", "\0 <|endoftext|> </s> <unk> <0x41>   ", "a" * 500]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("tokenizer") / "t.model"
    return train_sentencepiece([compare.real_text()], file, 600)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_tokenizers_give_the_same_ids(kind: str, sentencepiece: Tokenizer, tmp_path: Path) -> None:
    ours = ByteTokenizer() if kind == "bytes" else sentencepiece
    native = write_checkpoint(tmp_path / "native", ours, router=TOPK)
    to_hf(native.path, tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == ours.eod
    from_hf(tmp_path / "hf", tmp_path / "back")
    assert open_native(tmp_path / "back").tokenizer.fingerprint == ours.fingerprint


def test_ids_that_stand_for_no_text_are_never_written(tmp_path: Path) -> None:
    native = write_checkpoint(tmp_path / "native", router=TOPK)
    to_hf(native.path, tmp_path / "hf")
    written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert written["suppress_tokens"] == list(range(257, 320))
    assert written["eos_token_id"] == 256


def test_shards_have_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_train.hf.shards.SMALLEST", 100_000)
    native = write_checkpoint(tmp_path / "native", router=TOPK, vocab_size=3200)
    to_hf(native.path, tmp_path / "hf")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1
    assert files == {file.name for file in (tmp_path / "hf").glob("*.safetensors")}
    found = find_tensors(tmp_path / "hf")
    assert {name: file.name for name, file in found.items()} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(read_tensor(name, file).nbytes for name, file in found.items())


def test_tiny_shape_is_what_the_tests_mean() -> None:
    assert TINY["num_kv_heads"] < TINY["num_heads"]  # grouped queries are exported too
