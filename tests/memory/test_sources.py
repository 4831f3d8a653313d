"""Models by name, config, weights, optimizer state and Python code: exact to the parameter, or one line that says why
not."""

from __future__ import annotations

import copy
import json
import socket
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor

import optstate
from optstate import recipes
from optstate.memory.model import BuildOptions, Model, ParamShape
from optstate.memory.sources import SourceError, find_model, known_models, recipe_of_checkpoint
from optstate.memory.sources.builtin import CONFIGS
from optstate.memory.sources.modules import default_dtype
from optstate.memory.sources.shapes import ARCHITECTURES, list_parameters
from tests.support.models import mlp

pytestmark = pytest.mark.peer

HERE = __name__

PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "mistral-7b": 7_241_732_096,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
"""Counts of parameters as the headers of the published weights give them, a tied head once."""

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 12}

VARIANTS = [
    LLAMA,
    {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    {**LLAMA, "head_dim": 6, "num_key_value_heads": None},
    {**LLAMA, "model_type": "mistral", "num_attention_heads": 8, "num_key_value_heads": 8},
    {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    | {"model_type": "mistral", "num_attention_heads": 16, "head_dim": 2},
    {**LLAMA, "model_type": "qwen2"},
    {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True, "num_hidden_layers": 1},
    {**LLAMA, "model_type": "qwen3"},
    {**LLAMA, "model_type": "qwen3", "attention_bias": True, "head_dim": 8, "tie_word_embeddings": True},
    GPT2,
    {**GPT2, "n_inner": 20, "tie_word_embeddings": False},
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> None:
        raise AssertionError("nothing may go to the network")

    monkeypatch.setattr(socket.socket, "connect", refused)


def names_and_shapes(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(param.shape)) for name, param in module.named_parameters()]


def of(model: Model) -> list[tuple[str, tuple[int, ...]]]:
    return [(param.name, param.shape) for param in model.parameters]


def on_meta(config: dict[str, Any]) -> nn.Module:
    """transformers' own class, called as its documentation says."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))


def written(folder: Path, config: Any) -> Path:
    file = folder / "config.json"
    file.write_text(config if isinstance(config, str) else json.dumps(config))
    return file


def fails(source: Any, **settings: Any) -> str:
    with pytest.raises(SourceError) as caught:
        find_model(source, **settings)
    text = str(caught.value)
    assert "\n" not in text
    assert text.isprintable()
    return text


# --- published models and configs ---------------------------------------------------------------------------------


def test_published_models_are_exact_to_the_parameter() -> None:
    assert list(PUBLISHED) == known_models()
    counts = {name: sum(torch.Size(shape).numel() for _, shape in list_parameters(CONFIGS[name])) for name in CONFIGS}
    assert counts == PUBLISHED


@pytest.mark.parametrize("name", CONFIGS)
def test_published_shapes_are_those_of_transformers(name: str) -> None:
    layers = "n_layer" if CONFIGS[name]["model_type"] == "gpt2" else "num_hidden_layers"
    config = {**CONFIGS[name], layers: 2}
    assert list_parameters(config) == names_and_shapes(on_meta(config))


@pytest.mark.parametrize("config", VARIANTS, ids=lambda config: config["model_type"])
def test_names_shapes_and_order_are_those_of_transformers(config: dict[str, Any]) -> None:
    assert list_parameters(config) == names_and_shapes(on_meta(config))
    assert {variant["model_type"] for variant in VARIANTS} == set(ARCHITECTURES)


def test_a_published_model_is_described() -> None:
    model = find_model("LLaMA-7B", dtype="float16")
    assert (model.name, model.numel, model.layers) == ("llama-7b", 6_738_415_616, 32)
    assert {param.dtype for param in model.parameters} == {"float16"}
    assert max(param.numel for param in model.parameters) == 131_072_000
    assert transformers.__version__ in model.origin
    assert of(model) == list_parameters(CONFIGS["llama-7b"])


def test_an_unknown_name_suggests_the_nearest() -> None:
    assert "'llama-7b'" in fails("lama7b")
    assert "nothing is downloaded" in fails("meta-llama/Llama-3.1-8B")
    assert "'llama-3.1-8b'" in fails("meta-llama/Llama-3.1-8B")
    assert "names known here: llama-7b" in fails("\x1b[31mzzz\n")
    with pytest.raises(SourceError) as caught:
        find_model("lama7b")
    assert caught.value.usage


@pytest.mark.parametrize("source", ["config.json", "."])
def test_a_config_or_its_folder(source: str, tmp_path: Path) -> None:
    extra = {"torch_dtype": "float16", "use_cache": True, "quantization_config": {"quant_method": "awq", "bits": 4}}
    written(tmp_path, {**LLAMA, **extra})
    model = find_model(tmp_path / source)
    assert of(model) == names_and_shapes(on_meta(LLAMA))
    assert {param.dtype for param in model.parameters} == {"bfloat16"}
    assert model.layers == 4
    assert model.name == tmp_path.name
    assert model.buffer_bytes == sum(b.nbytes for b in on_meta(LLAMA).buffers())
    assert any("quantization_config" in note for note in model.notes)
    assert any("32 tokens" in note for note in model.notes)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [VARIANTS[0], VARIANTS[6], GPT2], ids=lambda config: config["model_type"])
def test_a_built_model_trains_on_fake_tensors(config: dict[str, Any], attention: str, tmp_path: Path) -> None:
    model = find_model(written(tmp_path, {**config, "torch_dtype": "float16"}))
    assert model.build is not None
    assert model.batch is not None
    for checkpointing in (False, True):
        with FakeTensorMode(), default_dtype(torch.bfloat16):
            module: Any = model.build(BuildOptions(2, attention, checkpointing))
            args, kwargs = model.batch(2, 8)
            module(*args, **kwargs).loss.backward()
        assert module.training
        assert module.config.use_cache is False
        assert module.config._attn_implementation == attention
        assert module.config.num_hidden_layers == 2
        assert any(getattr(part, "gradient_checkpointing", False) for part in module.modules()) is checkpointing
        for param in module.parameters():
            assert isinstance(param, FakeTensor)
            assert param.dtype == torch.bfloat16
            assert param.grad is not None
        assert {tensor.shape for tensor in kwargs.values()} == {(2, 8)}
    assert torch.get_default_dtype() == torch.float32


def test_a_model_is_built_with_any_number_of_layers(tmp_path: Path) -> None:
    kinds = {"layer_types": ["full_attention"] * 4}
    model = find_model(written(tmp_path, {**LLAMA, "model_type": "qwen2", **kinds}))
    assert model.build is not None
    for layers in (1, 3, 6, None):
        with FakeTensorMode():
            built = model.build(BuildOptions(layers=layers))
        config = {**LLAMA, "model_type": "qwen2", "num_hidden_layers": layers or 4}
        assert names_and_shapes(built) == list_parameters(config)


def test_a_type_that_tells_its_layers_itself_is_built_with_any_number(tmp_path: Path) -> None:
    """`layer_types` of a Mamba is read only."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 6, "state_size": 4, "expand": 2}
    config = {"model_type": "mamba", **sizes}
    model = find_model(written(tmp_path, config))
    assert (of(model), model.layers) == (names_and_shapes(on_meta(config)), 6)
    assert model.build is not None
    with FakeTensorMode():
        built = model.build(BuildOptions(layers=3))
    assert names_and_shapes(built) == names_and_shapes(on_meta({**config, "num_hidden_layers": 3}))


def test_layers_of_different_kinds_are_not_called_identical(tmp_path: Path) -> None:
    kinds = {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "sliding_window": 8,
        "use_sliding_window": True,
    }
    assert find_model(written(tmp_path, {**LLAMA, "model_type": "qwen2", **kinds})).layers is None


def test_learned_positions_end(tmp_path: Path) -> None:
    batch = find_model(written(tmp_path, GPT2)).batch
    assert batch is not None
    batch(1, 12)
    with pytest.raises(SourceError, match="learned positions for 12"):
        batch(1, 13)
    rotary = find_model(written(tmp_path, LLAMA)).batch
    assert rotary is not None
    rotary(1, 64)


def test_another_architecture_comes_from_transformers(tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24}
    config = {"model_type": "opt", **sizes, "word_embed_proj_dim": 16, "max_position_embeddings": 20}
    model = find_model(written(tmp_path, config))
    assert of(model) == names_and_shapes(on_meta(config))
    assert model.layers == 2
    assert model.batch is not None
    with pytest.raises(SourceError, match="learned positions for 20"):
        model.batch(1, 21)


def test_a_model_without_the_usual_attention_says_so(tmp_path: Path) -> None:
    config = {"model_type": "bloom", "vocab_size": 40, "hidden_size": 16, "n_layer": 3, "n_head": 2}
    model = find_model(written(tmp_path, config))
    assert model.layers == 3
    assert any("it has no sdpa attention in transformers: eager is run" in note for note in model.notes)
    assert model.build is not None
    with FakeTensorMode():
        built: Any = model.build(BuildOptions(layers=2))
    assert built.config._attn_implementation == "eager"


def test_a_trained_model_makes_no_remarks(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = find_model(written(tmp_path, {**GPT2, "bos_token_id": 50256}))
    assert model.build is not None
    assert model.batch is not None
    with FakeTensorMode():
        args, kwargs = model.batch(1, 8)
        model.build(BuildOptions(checkpointing=True))(*args, **kwargs).loss.backward()
    assert capfd.readouterr() == ("", "")


# --- without transformers -----------------------------------------------------------------------------------------


@pytest.fixture
def _without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.mark.usefixtures("_without_transformers")
def test_shapes_are_known_without_transformers(tmp_path: Path) -> None:
    model = find_model("llama-7b")
    assert (model.numel, model.build, model.batch) == (6_738_415_616, None, None)
    assert any("install transformers" in note for note in model.notes)
    assert [param.shape for param in find_model(written(tmp_path, GPT2)).parameters][:2] == [(50, 16), (12, 16)]
    assert "needs transformers" in fails(written(tmp_path, {"model_type": "opt", "hidden_size": 8}))
    assert "no intermediate_size" in fails(written(tmp_path, {**LLAMA, "intermediate_size": None}))


# --- configs that are none ----------------------------------------------------------------------------------------

BAD_CONFIGS = [
    ({**LLAMA, "hidden_size": 18}, "18, which 4 attention heads do not divide"),
    ({**LLAMA, "num_key_value_heads": 3}, "does not divide the 4"),
    ({**LLAMA, "hidden_size": "16"}, "hidden_size is '16'"),
    ({**LLAMA, "hidden_size": -16}, "hidden_size is -16"),
    ({**LLAMA, "num_hidden_layers": 0}, "no model has so few layers"),
    ({**LLAMA, "num_hidden_layers": 10**12}, "no model has so many layers"),
    ({**LLAMA, "vocab_size": 10**12}, "no model has so many tokens"),
    ({**LLAMA, "vocab_size": 1e5}, "whole number"),
    ({**LLAMA, "hidden_size": True}, "whole number"),
    ({**LLAMA, "vocab_size": [50]}, "whole number"),
    ({**LLAMA, "tie_word_embeddings": "no"}, "true or false"),
    ({**LLAMA, "rms_norm_eps": "small"}, "not possible"),
    ({key: value for key, value in LLAMA.items() if key != "intermediate_size"}, "has no intermediate_size"),
    ({key: value for key, value in GPT2.items() if key != "n_positions"}, "has no n_positions"),
    ({"model_type": "opt", "hidden_size": 16, "vocab_size": 16}, "has no num_hidden_layers"),
    ({"model_type": "vit", "hidden_size": 16}, "no causal language model of type 'vit'"),
    ({"model_type": "bert", "hidden_size": 16}, "an encoder unless is_decoder"),
    ({"model_type": "swin", "num_heads": [3, 6]}, "no causal language model of type 'swin'"),
    ({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}, "no causal language model"),
    ({**LLAMA, "model_type": "lamma"}, "knows no model_type 'lamma'"),
    ({**LLAMA, "model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, "which is not run"),
    ({**LLAMA, "model_type": None}, "it has no model_type"),
    ({"hidden_size": 16}, "it has no model_type"),
    ([LLAMA], "it holds a list"),
    ("{", "not valid JSON"),
    ('{"model_type": "llama"} {}', "'{' after its end"),
    ("[" * 100_000, "not valid JSON"),
]


@pytest.mark.parametrize(("config", "reason"), BAD_CONFIGS, ids=[reason for _, reason in BAD_CONFIGS])
def test_a_config_without_a_model(config: Any, reason: str, tmp_path: Path) -> None:
    file = written(tmp_path, config)
    text = fails(file)
    assert reason in text
    assert text.startswith(str(file))


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path) -> None:
    """An architecture that transformers has is built by transformers, whatever lies beside it."""
    (tmp_path / "modeling.py").write_text("raise SystemExit('run')")
    maps = {"auto_map": {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Own"}}
    written(tmp_path, {**LLAMA, **maps, "_name_or_path": str(tmp_path)})
    model = find_model(tmp_path)
    assert of(model) == list_parameters(LLAMA)
    assert model.build is not None
    with FakeTensorMode():
        assert type(model.build(BuildOptions())).__module__.startswith("transformers.")


def test_an_attention_that_does_not_exist(tmp_path: Path) -> None:
    model = find_model(written(tmp_path, LLAMA))
    assert model.build is not None
    with pytest.raises(SourceError, match="cannot build it with flashy attention"):
        model.build(BuildOptions(attention="flashy"))


@pytest.mark.parametrize("dtype", ["int8", "bf16", "Tensor", "float8_e4m3fn"])
def test_a_dtype_that_weights_do_not_have(dtype: str) -> None:
    assert f"dtype='{dtype}'" in fails("gpt2", dtype=dtype)


# --- weights ------------------------------------------------------------------------------------------------------


def tiny(tie: bool = False) -> Any:
    config = transformers.AutoConfig.for_model(**{**LLAMA, "tie_word_embeddings": tie})
    return transformers.AutoModelForCausalLM.from_config(config).half()


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("shards", [1, 4])
def test_weights_are_known_by_their_headers(shards: int, tie: bool, tmp_path: Path) -> None:
    module = tiny(tie)
    limit = sum(p.nbytes for p in module.parameters()) // shards + 2000
    module.save_pretrained(tmp_path, max_shard_size=limit)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is (shards > 1)
    assert find_model(tmp_path).build is not None  # with its config
    (tmp_path / "config.json").unlink()
    file = next(tmp_path.glob("*.index.json" if shards > 1 else "*.safetensors"))
    for source in (tmp_path, file):
        model = find_model(source)
        assert sorted(of(model)) == sorted(names_and_shapes(module))
        assert {param.dtype for param in model.parameters} == {"float16"}
        assert (model.build, model.layers, model.buffer_bytes) == (None, None, 0)
        assert any("not bfloat16" in note for note in model.notes)
        assert any("activations are not estimated" in note for note in model.notes)
    assert "only shapes are known" in fails(file, inputs=torch.zeros(1))


def saved(folder: Path, **tensors: Tensor) -> Path:
    file = folder / "model.safetensors"
    safetensors.torch.save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, file)
    return file


def test_buffers_among_weights(tmp_path: Path) -> None:
    mask, counts = torch.ones(1, 1, 4, 4), torch.zeros(1, dtype=torch.int64)
    weights = {"h__attn__c_attn__bias": torch.ones(3), "w__weight": torch.ones(2, 3)}
    file = saved(tmp_path, **weights, h__attn__bias=mask, n__running_mean=torch.ones(2), n__num_batches_tracked=counts)
    model = find_model(file)
    assert sorted(of(model)) == [("h.attn.c_attn.bias", (3,)), ("w.weight", (2, 3))]
    assert model.buffer_bytes == 64 + 8 + 8
    assert any("'h.attn.bias'" in note for note in model.notes)


PACKED = [
    {"m__qweight": torch.zeros(2, 2, dtype=torch.int32), "m__scales": torch.ones(2)},
    {"m__weight": torch.zeros(8, 1, dtype=torch.uint8), "m__weight__absmax": torch.ones(1)},
    {"m__weight": torch.zeros(8, 8, dtype=torch.int8), "m__SCB": torch.ones(8)},
    {"m__weight": torch.zeros(8, 8).to(torch.float8_e4m3fn), "m__bias": torch.ones(8)},
    {"m__weight": torch.zeros(8, 8, dtype=torch.uint8), "m__bias": torch.ones(8)},
]


@pytest.mark.parametrize("tensors", PACKED, ids=["gptq", "bitsandbytes 4-bit", "8-bit", "fp8", "codes"])
def test_quantised_weights_are_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    assert "quantised weights" in fails(saved(tmp_path, norm__weight=torch.ones(2), **tensors))


def test_files_that_hold_no_model(tmp_path: Path) -> None:
    adapter = {"base_model__model__q__lora_A__weight": torch.ones(2, 3)}
    assert "weights of an adapter" in fails(saved(tmp_path, **adapter))
    assert "no weights among its 1 tensors" in fails(saved(tmp_path, ids=torch.zeros(3, dtype=torch.int64)))
    file = saved(tmp_path, w=torch.ones(2))
    (tmp_path / "other.safetensors").write_bytes(file.read_bytes())
    assert "it holds 2 models: 'model.safetensors', 'other.safetensors'" in fails(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    assert str(file) in fails(file)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no config.json and no safetensors file" in fails(empty)
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin" in fails(tmp_path / "pytorch_model.bin")
    (tmp_path / "notes.txt").write_text("notes")
    assert "a file of unknown kind: no config.json" in fails(tmp_path / "notes.txt")


# --- optimizer state ----------------------------------------------------------------------------------------------


def trained(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    module(torch.ones(3, 8, dtype=module[0].weight.dtype)).float().square().mean().backward()  # type: ignore[index]
    optimizer.step()


def test_a_checkpoint_of_ours(tmp_path: Path) -> None:
    module = mlp(torch.bfloat16)
    module[1].weight.requires_grad_(False)
    optimizer = recipes.get("adalomo")(module.named_parameters())
    trained(optimizer, module)
    file = tmp_path / "opt.safetensors"
    optstate.save(optimizer, file)
    for source in (file, tmp_path):
        model = find_model(source, dtype="float32")
        assert of(model) == names_and_shapes(module)
        assert {param.dtype for param in model.parameters} == {"bfloat16"}
        assert [param.name for param in model.parameters if not param.trainable] == ["1.weight"]
        state = f"{optimizer.state_nbytes() / 2**30:.3f} GiB"
        assert any(f"resuming needs {state}" in note and "adalomo, step 1" in note for note in model.notes)
        assert recipe_of_checkpoint(source) == "adalomo"
    saved(tmp_path, w=torch.ones(7))  # weights beside it are the model
    assert of(find_model(tmp_path)) == [("w", (7,))]


def test_a_checkpoint_of_pytorch(tmp_path: Path) -> None:
    module = mlp()
    optimizer = torch.optim.AdamW(module.parameters())
    trained(optimizer, module)
    file = tmp_path / "optimizer.pt"
    torch.save(optimizer.state_dict(), file)
    model = find_model(file, dtype="float16")
    assert [param.shape for param in model.parameters] == [tuple(param.shape) for param in module.parameters()]
    assert {(param.dtype, param.trainable) for param in model.parameters} == {("float16", True)}
    assert any("float16 is assumed" in note for note in model.notes)
    assert recipe_of_checkpoint(file) == "adamw"


def test_weights_that_pytorch_saved_are_no_state(tmp_path: Path) -> None:
    torch.save(mlp().state_dict(), tmp_path / "model.pt")
    line = fails(tmp_path / "model.pt")
    assert "looks like model weights" in line
    assert line.endswith("give the model's config.json, safetensors file or package.module:factory")


def test_state_that_tells_no_shapes(tmp_path: Path) -> None:
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    trained(optimizer, module)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    assert "give names with shapes" in fails(tmp_path / "optimizer.pt")
    assert "no such file" in fails(tmp_path / "optimizer.pt", names=str(tmp_path / "names.json"))
    (tmp_path / "names.json").write_text(json.dumps({name: list(p.shape) for name, p in module.named_parameters()}))
    assert of(find_model(tmp_path / "optimizer.pt", names=str(tmp_path / "names.json"))) == names_and_shapes(module)


# --- Python code --------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Tied, with a buffer, with tensors that are neither, frozen in part, hooked."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(3, 5).t(), requires_grad=False)
        self.register_buffer("scale", torch.ones(3, dtype=torch.float64))
        self.plain = torch.full((4,), 2.0)
        self.within = [self.head.weight[0] * 2]
        self.forgotten = lambda value: value

    def forward(self, ids: Tensor) -> Tensor:
        value = self.head(self.embed(ids)).sum() * self.plain.sum() * self.within[0].detach().sum()
        return value.float() * self.scale.sum().float() + self.frozen.sum().float()


MODULE = Odd()
NUMBER = 3


def factory() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))


def keeps_its_dtype() -> nn.Module:
    return factory().to(torch.float64)


def language_model() -> nn.Module:
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**LLAMA))


def raising() -> nn.Module:
    raise OSError("no such\nthing \x1b[31m")


def leaving() -> nn.Module:
    sys.exit("gone")


def reading() -> nn.Module:
    module = nn.Linear(2, 2)
    if module.weight.sum() > 0:
        return module
    return module.half()


class Elsewhere(nn.Linear):
    """One of its buffers says that it is on a GPU, which need not be there."""

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        yield "table", SimpleNamespace(device=torch.device("cuda:0"))


def elsewhere() -> nn.Module:
    return Elsewhere(2, 2)


def nothing() -> nn.Module:
    return nn.Identity()


def eighths() -> nn.Module:
    module = nn.Module()
    module.codes = nn.Parameter(torch.zeros(2, dtype=torch.float8_e4m3fn))
    return module


def frozen_codes() -> nn.Module:
    """A matrix in 4 bits that does not train, beside an adapter that does."""
    module = nn.Linear(8, 2, dtype=torch.bfloat16)
    module.codes = nn.Parameter(torch.zeros(128, 1, dtype=torch.uint8), requires_grad=False)
    return module


def lazy() -> nn.Module:
    return nn.LazyLinear(3)


def pair(batch_size: int, seq_len: int) -> Any:
    return (torch.zeros(batch_size, 8),), {"scale": torch.zeros(seq_len)}


def always() -> Any:
    return {"x": torch.zeros(5, 8)}


def bad_inputs(batch_size: int) -> Any:
    raise ValueError("no\ninputs")


def test_a_factory_by_name_is_built_on_fake_tensors() -> None:
    model = find_model(f"{HERE}:factory", inputs=f"{HERE}:pair")
    assert of(model) == names_and_shapes(factory())
    assert {param.dtype for param in model.parameters} == {"bfloat16"}
    assert model.buffer_bytes == 2 * 4 * 2 + 8
    assert (model.layers, model.notes) == (None, ())
    assert model.batch is not None
    assert model.build is not None
    with FakeTensorMode(), default_dtype(torch.bfloat16):
        args, kwargs = model.batch(3, 7)
        assert (args[0].shape, kwargs["scale"].shape) == ((3, 8), (7,))
        built = model.build(BuildOptions())
        built(args[0]).sum().backward()
    assert all(isinstance(param, FakeTensor) and param.grad is not None for param in built.parameters())


def test_a_factory_with_a_dtype_of_its_own() -> None:
    model = find_model(keeps_its_dtype)
    assert {param.dtype for param in model.parameters} == {"float64"}
    assert any("float64, as the module has them" in note for note in model.notes)
    assert any("no inputs were given" in note for note in model.notes)
    assert model.batch is None
    assert model.build is not None
    with FakeTensorMode():
        built = model.build(BuildOptions())
    assert all(isinstance(p, FakeTensor) and p.dtype == torch.float64 for p in built.parameters())


@pytest.mark.parametrize("source", [keeps_its_dtype, keeps_its_dtype()], ids=["factory", "module"])
def test_outside_of_fake_tensors_a_model_has_values(source: Any) -> None:
    build = find_model(source).build
    assert build is not None
    built: Any = build(BuildOptions())
    assert torch.equal(built[1].weight, torch.ones(4, dtype=torch.float64))
    assert built is not source


def test_a_factory_of_a_language_model_needs_no_inputs() -> None:
    model = find_model(language_model)
    assert of(model) == list_parameters(LLAMA)
    assert model.batch is not None
    assert model.build is not None
    with FakeTensorMode():
        module: Any = model.build(BuildOptions(attention="eager", checkpointing=True))
        args, kwargs = model.batch(1, 4)
        module(*args, **kwargs).loss.backward()
    assert module.config._attn_implementation == "eager"


def test_frozen_codes_are_weights_without_state() -> None:
    found = {param.name: param for param in find_model(frozen_codes).parameters}
    assert found["codes"] == ParamShape("codes", (128, 1), "uint8", trainable=False)
    for recipe, state in (("adamw", 2 * 4 * 18), ("adamw8bit", None), ("adalomo", None), ("adammini", None)):
        estimate = optstate.estimate(frozen_codes, recipe=recipe, dtype="bfloat16")[recipe]
        assert estimate.weights_bytes == 128 + 2 * 18
        if state is not None:
            assert estimate.state_bytes == state


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raising", "fails: OSError: no such thing \\x1b[31m"),
        ("leaving", "fails: SystemExit: gone"),
        ("reading", "leave reading them and loading weights out of it"),
        ("elsewhere", "puts 'table' on cuda:0"),
        ("nothing", "has no parameters"),
        ("eighths", "'codes' is float8_e4m3fn and not frozen"),
        ("lazy", "has no shape yet"),
        ("always", "returns a dict"),
        ("NUMBER", "is of type int"),
        ("missing", "cannot be found: AttributeError"),
    ],
)
def test_a_factory_that_makes_no_model(name: str, reason: str) -> None:
    assert reason in fails(f"{HERE}:{name}")


def test_a_module_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ModuleNotFoundError" in fails("not_a_package.here:factory")
    (tmp_path / "broken_for_estimate.py").write_text("1 / 0")
    (tmp_path / "good_for_estimate.py").write_text("import torch\ndef model(): return torch.nn.Linear(2, 3)")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert "importing its module fails: ZeroDivisionError" in fails("broken_for_estimate:model")
    assert of(find_model("good_for_estimate:model")) == [("weight", (3, 2)), ("bias", (3,))]
    assert sys.path == before


@pytest.mark.parametrize("source", [MODULE, f"{HERE}:MODULE"], ids=["module", "name"])
def test_a_module_is_copied_without_its_values(source: Any) -> None:
    before = copy.deepcopy(MODULE.state_dict())
    model = find_model(source, inputs=(torch.zeros(2, 3, dtype=torch.long),))
    assert of(model) == names_and_shapes(MODULE)
    assert [param.name for param in model.parameters if not param.trainable] == ["frozen"]
    assert model.buffer_bytes == 24
    assert model.build is not None
    assert model.batch is not None
    with FakeTensorMode():
        built: Any = model.build(BuildOptions())
        args, _ = model.batch(1, 1)
        built(*args).backward()
    assert all(isinstance(t, FakeTensor) for t in (*built.parameters(), *built.buffers(), *args))
    assert isinstance(built.plain, FakeTensor)
    assert built.head.weight is built.embed.weight
    assert built.frozen.stride() == MODULE.frozen.stride()
    assert built.embed.weight.grad is not None
    assert MODULE.embed.weight.grad is None
    for key, value in MODULE.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_module_that_cannot_be_copied() -> None:
    module = nn.Linear(2, 2)
    module.lock = __import__("threading").Lock()
    build = find_model(module).build
    assert build is not None
    for mode in (FakeTensorMode(), nullcontext()):
        with mode, pytest.raises(SourceError, match="give a function that makes it"):
            build(BuildOptions())


def test_checkpointing_of_a_module_that_has_none() -> None:
    build = find_model(factory).build
    assert build is not None
    with pytest.raises(SourceError, match="checkpoint inside it"):
        build(BuildOptions(checkpointing=True))


def test_attention_of_a_module_that_has_none_to_choose() -> None:
    build = find_model(factory).build
    assert build is not None
    with pytest.raises(SourceError, match="choose eager attention inside it"):
        build(BuildOptions(attention="eager"))


def test_inputs_follow_sizes_only_as_functions_of_them() -> None:
    given = [None, torch.zeros(5, 8), always, lambda count, length: torch.zeros(count, length, 8)]
    assert [find_model(factory, inputs=one).sized for one in given] == [True, False, False, True]


def test_inputs_in_every_form() -> None:
    x = torch.zeros(5, 8)
    for inputs in (x, (x,), [x], ((x,), {}), always, f"{HERE}:always"):
        batch = find_model(factory, inputs=inputs).batch
        assert batch is not None
        args, kwargs = batch(1, 2)
        (tensor,) = (*args, *kwargs.values())
        assert tensor.shape == (5, 8)
    assert "of type int" in fails(factory, inputs=3)
    assert "give package.module:function" in fails(factory, inputs="inputs.pt")
    batch = find_model(factory, inputs=bad_inputs).batch
    assert batch is not None
    with pytest.raises(SourceError, match="fail: TypeError"):
        batch(1, 2)


def test_inputs_of_a_config_replace_its_tokens(tmp_path: Path) -> None:
    model = find_model(written(tmp_path, LLAMA), inputs={"input_ids": torch.zeros(1, 3, dtype=torch.long)})
    assert model.batch is not None
    assert list(model.batch(4, 4)[1]) == ["input_ids"]


@pytest.mark.parametrize("source", [None, 3, ["llama-7b"]])
def test_what_is_no_source(source: Any) -> None:
    assert "no source of a model" in fails(source)


@pytest.fixture(scope="module", autouse=True)
def _whole_default_dtype() -> Iterator[None]:
    yield
    assert torch.get_default_dtype() == torch.float32
