"""Traces against closed formulas, against what a real step allocates, and against themselves at other depths."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

import optstate
from adalomo import AdaLomo, Lomo
from optstate.memory import peak_extra_bytes
from optstate.memory.model import KINDS, BuildOptions, Model, Setting, Trace
from optstate.memory.tracing.extrapolate import trace_model
from optstate.memory.tracing.trace import UntraceableError, trace_step
from optstate.recipes import AdamW, registry
from tests.support.memory_models import MLP, Block, Tokens, llama, model_of, real_peak, token_batch, tokens

pytestmark = pytest.mark.slow

FP32 = Setting(dtype="float32", batch_size=8, seq_len=4)
INPUTS, HIDDEN, OUTPUTS = 1000, 16, 4


def mlp(**options: Any) -> Trace:
    """On 8 rows of numbers, exact bytes."""
    model = model_of(lambda _: MLP(INPUTS, HIDDEN, OUTPUTS), lambda count, _: ((torch.zeros(count, INPUTS),), {}))
    return trace_step(model, options.pop("recipe", Lomo), replace(FP32, **options), device="cpu")


# --- closed formulas ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_the_peak_of_an_mlp_is_where_the_first_gradient_is_made(fused: bool) -> None:
    """Alive: weights, inputs, the gradient of the ReLU's input, dW1, loss and its gradient; stepped, dW2 too."""
    first, second = 4 * INPUTS * HIDDEN, 4 * HIDDEN * OUTPUTS
    seen = mlp(fused_backward=fused)
    assert seen.peak == first + second + 4 * 8 * INPUTS + 4 * 8 * HIDDEN + first + 8 + (0 if fused else second)
    assert seen.phase == "backward:first"
    assert seen.at_peak["weights"] == first + second
    assert seen.at_peak["gradients"] == first + (0 if fused else second)
    assert seen.most["gradients"] == (first if fused else first + second)
    assert sum(seen.at_peak.values()) == seen.peak
    assert set(seen.at_peak) == set(seen.most) == set(KINDS)


def test_state_is_alive_all_the_time() -> None:
    plain, adamw = mlp(recipe=Lomo), mlp(recipe=AdamW)
    state = 8 * (INPUTS * HIDDEN + HIDDEN * OUTPUTS)
    assert adamw.at_peak["state"] == adamw.most["state"] == state
    assert adamw.peak == plain.peak + state


def test_accumulation_keeps_all_gradients_and_needs_one_more() -> None:
    first, second = 4 * INPUTS * HIDDEN, 4 * HIDDEN * OUTPUTS
    for fused in (False, True):
        assert mlp(grad_accum=3, fused_backward=fused).most["gradients"] == 2 * first + second


def test_clipping_by_norm_keeps_no_gradients_if_the_backward_is_fused() -> None:
    first = 4 * INPUTS * HIDDEN
    assert mlp(clip="norm", fused_backward=True).most["gradients"] == first
    assert mlp(clip="norm").most["gradients"] > first


def test_storages_are_rounded_up_for_an_accelerator() -> None:
    model = model_of(lambda _: nn.Sequential(nn.Linear(3, 1), Sum()), lambda count, _: ((torch.zeros(count, 3),), {}))
    seen = trace_step(model, Lomo, FP32)
    assert seen.at_peak["weights"] == 2 * 512
    assert seen.peak % 512 == 0


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


@pytest.mark.parametrize("fused", [False, True])
def test_a_tied_matrix_needs_three_gradients_of_its_size(fused: bool) -> None:
    """The head's waits for the embedding's, and their sum is a third; untied and fused, one is alive at a time."""
    matrix = 4 * 1000 * 16
    tied = trace_step(tokens(tied=True), Lomo, replace(FP32, fused_backward=fused), device="cpu")
    untied = trace_step(tokens(), Lomo, replace(FP32, fused_backward=fused), device="cpu")
    assert tied.at_peak["weights"] < untied.at_peak["weights"]
    assert 3 * matrix <= tied.most["gradients"] < 3.1 * matrix
    assert untied.most["gradients"] == (matrix if fused else 2 * matrix + 2 * 4 * 17 * 16)


def test_logits_and_losses_are_told_from_activations() -> None:
    """Logits, their log-softmax and its gradient, each rows x vocabulary."""
    seen = trace_step(tokens(), Lomo, replace(FP32, fused_backward=True), device="cpu")
    logits = 4 * 8 * 4 * 1000
    assert 2 * logits <= seen.most["logits"] <= 3 * logits + 8
    assert seen.most["activations"] < logits
    assert seen.phase == "backward:loss"
    assert ("logits", (32, 1000)) in {(item.kind, item.shape) for item in seen.alive}


# --- against real steps -----------------------------------------------------------------------------------------------

SMALL = Setting(dtype="float32", batch_size=2, seq_len=128)
GRID = [
    ("adalomo", False, SMALL),
    ("adalomo", True, replace(SMALL, fused_backward=True, checkpointing=True)),
    ("adamw", True, replace(SMALL, attention="eager", grad_accum=2)),
    ("adamw8bit", False, replace(SMALL, fused_backward=True, attention="eager")),
    ("lion", False, replace(SMALL, fused_backward=True, checkpointing=True, clip="norm")),
    ("sgd", True, replace(SMALL, clip="norm", checkpointing=True, attention="eager")),
]


@pytest.mark.parametrize(("name", "tied", "setting"), GRID)
def test_a_llama_needs_what_a_real_step_allocates(name: str, tied: bool, setting: Setting) -> None:
    model, recipe = llama(layers=2, tied=tied), registry.get(name)
    expected = real_peak(model, recipe, setting)
    assert trace_step(model, recipe, setting, device="cpu").peak == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_model_without_hidden_buffers_needs_it_to_the_byte(tied: bool, fused: bool, accumulated: int) -> None:
    model = tokens(vocabulary=3000, layers=3, tied=tied)
    setting = replace(FP32, fused_backward=fused, grad_accum=accumulated)
    assert trace_step(model, Lomo, setting, device="cpu").peak == real_peak(model, Lomo, setting)


TAKE_SINGULAR_VECTORS = ("adarankgrad", "galore", "qgalore")
"""LAPACK's room for a decomposition, a seventh of the scratch memory here, is not seen where tensors have no values."""


@pytest.mark.parametrize("name", registry.names())
def test_updates_of_large_parameters_need_what_real_ones_do(name: str) -> None:
    """Though only the first rounds of their loops are run; of the dearest step, which makes a basis where there is one.

    Tables of codes, 137 kB, count each time they are used; products in bf16 have 15 kB of oneDNN's beside them.
    """
    shape = (1500, 1024)

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(shape))

        def forward(self, x: Tensor) -> Tensor:
            return (self.weight * x).sum()

    model = model_of(lambda _: One(), lambda *_: ((torch.zeros(()),), {}))
    seen = trace_step(model, registry.get(name), FP32, device="cpu")
    param = nn.Parameter(torch.ones(shape))
    optimizer = registry.get(name)([("weight", param)])
    param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer.use_backend("eager")
    optimizer.step()
    unseen = 0.17 * seen.most["scratch"] if name in TAKE_SINGULAR_VECTORS else 15_000 if name.startswith("muon") else 20
    (plan,) = optimizer.plan()
    for backend in ("eager", "auto"):  # a whole step needs no more than the transforms, which are traced
        optimizer.use_backend(backend)
        optimizer.state[param]["step"] = plan.chain.period
        real = peak_extra_bytes(optimizer.step)
        assert real <= seen.most["scratch"] + unseen + 1000 * (backend == "auto")
        assert backend == "auto" or real >= seen.most["scratch"] - 138_000


# --- kernels of accelerators ------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal attention over 64 channels in 4 heads; returns the mean square of its outputs."""

    def __init__(self, dropout: float, named: bool = True) -> None:
        super().__init__()
        self.dropout, self.named = dropout, named
        self.qkv = nn.Linear(64, 3 * 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        if self.named:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True).square().mean()
        return F.scaled_dot_product_attention(q, k, v, None, self.dropout, True).square().mean()


def attention(dropout: float, named: bool = True) -> Model:
    return model_of(lambda _: Attention(dropout, named), lambda count, length: ((torch.zeros(count, length, 64),), {}))


SCORES = replace(FP32, batch_size=2, seq_len=512)


@pytest.mark.parametrize("named", [False, True])
def test_dropout_in_attention_keeps_nothing_on_an_accelerator(named: bool) -> None:
    """Flash and memory-efficient kernels keep output and log-sum-exp, and make the mask again: linear in length."""
    seen = trace_step(attention(0.1, named), Lomo, SCORES)
    assert seen == trace_step(attention(0.0), Lomo, SCORES)
    assert not seen.notes
    tokens = 2 * 512
    kept = 4 * tokens * (64 + 3 * 64 + 64 + 4)  # inputs, queries with keys and values, outputs, log-sum-exp
    gradients = 4 * tokens * (64 + 3 * 64 + 3 * 64)  # of outputs, of queries, keys and values, and of all in one
    assert kept <= seen.most["activations"] + seen.most["logits"] <= kept + gradients + 4 * 512
    longer = trace_step(attention(0.1, named), Lomo, replace(SCORES, seq_len=1024))
    weights = seen.at_peak["weights"]
    assert longer.peak - weights == pytest.approx(2 * (seen.peak - weights), rel=0.05)


def test_a_gpt2_needs_what_a_real_step_without_that_dropout_allocates() -> None:
    """Without, the CPU has a fused kernel, too. With it, its real steps need much more, and traces for it say so."""
    transformers = __import__("transformers")

    def gpt2(dropout: float) -> Model:
        sizes = {"n_layer": 2, "n_embd": 128, "n_head": 8, "vocab_size": 1000}

        def build(options: BuildOptions) -> nn.Module:
            config = transformers.GPT2Config(**sizes, attn_pdrop=dropout, use_cache=False, attn_implementation="sdpa")
            return transformers.GPT2LMHeadModel(config).train()

        def batch(count: int, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
            ids = torch.zeros(count, length, dtype=torch.long)
            return (), {"input_ids": ids, "labels": ids}

        return model_of(build, batch)

    setting = replace(SMALL, seq_len=256)
    real = {dropout: real_peak(gpt2(dropout), AdamW, setting) for dropout in (0.0, 0.1)}
    assert real[0.1] > 1.3 * real[0.0]
    assert trace_step(gpt2(0.1), AdamW, setting).peak == pytest.approx(real[0.0], rel=0.005)  # sizes rounded up to 512
    assert trace_step(gpt2(0.1), AdamW, setting, device="cpu").peak == pytest.approx(real[0.1], rel=0.005)


def test_attention_that_pytorch_calls_itself_is_without_dropout_too() -> None:
    class Layer(nn.TransformerEncoderLayer):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x).sum()

    def layer(dropout: float) -> Model:
        def build(_: BuildOptions) -> nn.Module:
            made = Layer(64, 4, 128, dropout=0.1, batch_first=True)
            made.self_attn.dropout = dropout
            return made

        return model_of(build, lambda count, length: ((torch.zeros(count, length, 64),), {}))

    assert trace_step(layer(0.1), Lomo, SCORES) == trace_step(layer(0.0), Lomo, SCORES)
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_dropout_in_attention_is_written_out_on_the_cpu_and_real_steps_need_it() -> None:
    model = attention(0.1)
    seen = trace_step(model, Lomo, SCORES, device="cpu")
    assert seen.peak == pytest.approx(real_peak(model, Lomo, SCORES), rel=0.005)
    assert seen.peak > 2 * 4 * 512 * 512 * 4 > trace_step(model, Lomo, SCORES).peak
    assert any("written out" in note for note in seen.notes)


def test_heads_that_no_fused_kernel_takes_are_told() -> None:
    class Narrow(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(2, (3, 4, 16)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v[..., :8], is_causal=True).sum()

    model = replace(attention(0.0), build=lambda _: Narrow(0.0))
    assert any("written out" in note for note in trace_step(model, Lomo, SCORES).notes)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_need_what_real_ones_do_step_by_step(kind: type[nn.RNNBase]) -> None:
    """oneDNN's kernel of an LSTM hides half of what it takes; without it a real step allocates what is traced."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = kind(64, 128, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)[0].square().mean()

    model = model_of(lambda _: Recurrent(), lambda count, length: ((torch.zeros(count, length, 64),), {}))
    setting = replace(FP32, batch_size=16, seq_len=20)
    seen = trace_step(model, AdamW, setting)
    with torch.backends.mkldnn.flags(enabled=False):
        assert seen.peak == pytest.approx(real_peak(model, AdamW, setting), rel=0.01)  # sizes rounded up to 512 bytes
    assert any("step by step" in note for note in seen.notes)
    assert torch.backends.mkldnn.enabled


# --- depth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "device", "setting"),
    [
        ("adalomo", "cuda", replace(SMALL, fused_backward=True, checkpointing=True)),
        ("adamw8bit", "cuda", SMALL),
        ("adalomo", "cpu", replace(SMALL, fused_backward=True, clip="norm", attention="eager")),
    ],
)
def test_shallow_traces_tell_the_deep_one_to_the_byte(name: str, device: str, setting: Setting) -> None:
    model = llama(layers=8, hidden_size=64, intermediate_size=172, num_attention_heads=4)
    recipe = registry.get(name)
    short, how = trace_model(model, recipe, setting, device=device)
    whole, how_whole = trace_model(model, recipe, setting, exact=True, device=device)
    assert how == "traced with 3, 4 and 5 layers, extrapolated to 8"
    assert how_whole == "traced in full"
    assert (short.peak, short.phase, short.at_peak, short.most) == (whole.peak, whole.phase, whole.at_peak, whole.most)
    for kind in KINDS:
        largest = [next((item for item in one.alive if item.kind == kind), None) for one in (short, whole)]
        assert largest[0] is largest[1] is None or largest[0].nbytes == largest[1].nbytes


def test_a_peak_that_moves_with_depth_is_found() -> None:
    """Few layers peak at the loss, many where all their gradients are: the shallow traces never see it."""
    model = tokens(vocabulary=2000, width=32, hidden=128, layers=40)
    shallow = trace_step(model, Lomo, FP32, layers=5, device="cpu")
    short, how = trace_model(model, Lomo, FP32, device="cpu")
    whole = trace_step(model, Lomo, FP32, device="cpu")
    assert "extrapolated to 40" in how
    assert shallow.phase == "backward:loss"
    assert whole.phase == "backward:embedding"
    assert (short.peak, short.phase, short.at_peak, short.most) == (whole.peak, whole.phase, whole.at_peak, whole.most)


def test_layers_that_differ_are_traced_in_full() -> None:
    """Every other layer is wider inside: three traces do not lie on a line."""

    def build(options: BuildOptions) -> nn.Module:
        made = Tokens()
        made.layers = nn.ModuleList(Block(16, 16 * (1 + i % 2)) for i in range(options.layers or 12))
        return made

    model = model_of(build, token_batch, layers=12)
    seen, how = trace_model(model, Lomo, FP32, device="cpu")
    assert how.startswith("traced in full, because layers add different numbers of bytes at ")
    assert seen == trace_step(model, Lomo, FP32, device="cpu")


def test_layers_without_a_list_of_their_own_are_traced_in_full() -> None:
    class Flat(Tokens):
        def __init__(self, count: int) -> None:
            super().__init__(layers=0)
            for number in range(count):
                self.add_module(f"layer_{number}", nn.Linear(16, 16))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            for layer in list(self.children())[3:]:
                x = layer(x)
            return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())

    model = model_of(lambda options: Flat(options.layers or 8), token_batch, layers=8)
    assert trace_model(model, Lomo, FP32)[1] == "traced in full, because its layers could not be told apart"


def test_a_shallow_model_is_traced_in_full() -> None:
    assert trace_model(tokens(layers=5), Lomo, FP32)[1] == "traced in full"


# --- what is left as it was -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "fused"), [(name, i % 2 == 0) for i, name in enumerate(registry.names())])
def test_every_recipe_is_traced(name: str, fused: bool) -> None:
    model = tokens(layers=2, width=64)
    setting = replace(FP32, dtype="bfloat16", fused_backward=fused)
    seen = trace_step(model, registry.get(name), setting, device="cpu")
    module = Tokens(1000, 64, 2).to(torch.bfloat16)
    assert seen.most["state"] == registry.get(name)(optstate.declare_roles(module)).state_nbytes()


def test_a_live_module_is_traced_and_left_as_it_was() -> None:
    module = Tokens(layers=2, tied=True).eval()
    module.head.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    tensors = {name: id(value) for name, value in module.named_parameters(remove_duplicate=False)}
    model = model_of(lambda _: module, token_batch)
    dtype, collects, random = torch.get_default_dtype(), gc.isenabled(), torch.get_rng_state()
    seen = trace_step(model, AdaLomo, replace(FP32, fused_backward=True), device="cpu")
    assert (torch.get_default_dtype(), gc.isenabled()) == (dtype, collects)
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: id(value) for name, value in module.named_parameters(remove_duplicate=False)} == tensors
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [part.training for part in (module, module.embedding, module.head)] == [False, False, True]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(param.grad is None for param in module.parameters())
    fresh = trace_step(tokens(layers=2, tied=True), AdaLomo, replace(FP32, fused_backward=True), device="cpu")
    assert seen == fresh


@pytest.mark.parametrize("tied", [False, True])
def test_factories_may_convert_what_they_build(tied: bool) -> None:
    """And tied parameters stay tied."""

    def build(_: BuildOptions) -> nn.Module:
        return Tokens(tied=tied).to(torch.bfloat16).cuda().train()

    converted = trace_step(replace(tokens(tied=tied), build=build), Lomo, FP32)
    assert converted == trace_step(tokens(tied=tied), Lomo, replace(FP32, dtype="bfloat16"))


def test_code_that_asks_for_a_gpu_gets_the_stand_in() -> None:
    """A fake tensor on a GPU that is not there ends the process in a backward pass."""
    made: list[Tensor] = []

    class Hard(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(16, device="cuda"))
            self.cuda()
            self.to("cuda")
            self.to(torch.device("cuda", 1), torch.bfloat16)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids.cuda()) * self.scale.to("cuda")
            made.extend([x, torch.arange(3, device=torch.device("cuda"))])
            return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten().to(device="cuda"))

    model = replace(tokens(), build=lambda _: Hard())
    seen = trace_step(model, Lomo, FP32)
    assert seen.peak > 0
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert all(isinstance(tensor, FakeTensor) for tensor in made)


# --- what cannot be traced --------------------------------------------------------------------------------------------


class Reads(Tokens):
    def forward(self, ids: Tensor) -> Tensor:
        loss = super().forward(ids)
        return loss * 2 if loss > 0 else loss


class Routes(Tokens):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids[ids.flatten().nonzero()])


class Broken(Tokens):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).transpose(1, 2)).sum()


class NoLoss(Tokens):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


class OtherKeys(Tokens):
    def forward(self, ids: Tensor) -> Any:
        return {"logits": self.head(self.embedding(ids))}


class Mixed(Tokens):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).float()).sum()


class MixedConvolution(Tokens):
    def forward(self, ids: Tensor) -> Tensor:
        return F.conv1d(self.embedding(ids).transpose(1, 2), self.head.weight[:, :, None].double()).sum()


class Impossible(Tokens):
    def __init__(self) -> None:
        raise OSError("no such file:\nand more")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Reads, ["aten._local_scalar_dense.default needs the values of tensors", "in forward"]),
        (Routes, ["aten.nonzero.default needs the values of tensors", "in forward"]),
        (Broken, ["RuntimeError in forward:head"]),
        (NoLoss, ["returns a tensor of 8 x 4 x 1000, and no loss: let it return a tensor of one number"]),
        (OtherKeys, ["returns a dict, and no loss", "'loss'"]),
        (Mixed, ["TypeError in forward:head: a product of float32 and bfloat16 tensors", "give inputs of the dtype"]),
        (MixedConvolution, ["a product of bfloat16 and float64 tensors"]),
        (Impossible, ["OSError in its construction: no such file:"]),
    ],
)
def test_what_cannot_be_traced_names_the_operation(kind: type[nn.Module], words: list[str]) -> None:
    model = replace(tokens(), name="my model", build=lambda _: kind())
    dtype, collects = torch.get_default_dtype(), gc.isenabled()
    with pytest.raises(UntraceableError) as caught:
        trace_model(model, Lomo, replace(FP32, dtype="bfloat16"))
    message = str(caught.value)
    assert message.startswith("my model cannot be traced: ")
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert (torch.get_default_dtype(), gc.isenabled()) == (dtype, collects)


@pytest.mark.parametrize("kind", [Mixed, MixedConvolution])
def test_mixtures_that_are_refused_are_those_that_pytorch_refuses(kind: type[nn.Module]) -> None:
    with pytest.raises(RuntimeError, match="dtype|type"):
        kind().to(torch.bfloat16)(torch.zeros(8, 4, dtype=torch.long))


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda loss: {"loss": loss},
        lambda loss: (loss, loss.new_zeros(1000)),
        lambda loss: [loss],
        lambda loss: SimpleNamespace(loss=loss),
    ],
)
def test_a_loss_may_be_where_trainers_look_for_it(wrapped: Any) -> None:
    class Wrapped(Tokens):
        def forward(self, ids: Tensor) -> Any:
            return wrapped(super().forward(ids))

    seen = trace_step(replace(tokens(), build=lambda _: Wrapped()), Lomo, FP32)
    plain = trace_step(tokens(), Lomo, FP32)
    assert plain.peak <= seen.peak <= plain.peak + 4 * 1024  # what is returned beside it


def test_shapes_alone_are_not_enough() -> None:
    with pytest.raises(UntraceableError, match="only the shapes of its parameters are known"):
        trace_step(replace(tokens(), build=None), Lomo, FP32)


def test_a_recipe_that_refuses_speaks_for_itself() -> None:
    with pytest.raises(ValueError, match="learning rate|lr") as caught:
        trace_step(tokens(), lambda params: Lomo(params, lr=-1.0), FP32)
    assert not isinstance(caught.value, UntraceableError)
