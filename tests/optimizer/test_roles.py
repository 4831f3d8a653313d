"""Roles as declared by the modules of real models: every parameter's role and head size, written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from torch import nn

from examples.gpt import GPT, GPTConfig
from optstate import recipes
from optstate.roles import declare_roles

WIDTH, HEADS, VOCABULARY = 32, 4, 50
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
    "intermediate_size": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}


def roles_of(model: nn.Module) -> dict[str, str]:
    """Name -> role, followed by the head size where there is one."""
    return {
        name: f"{group['role']} {group['head_size']}" if "head_size" in group else group["role"]
        for group in declare_roles(model)
        for name, _ in group["params"]
    }


def table(text: str) -> dict[str, str]:
    """Lines of a name and what is expected of it; `a.{weight,bias}` stands for both."""
    rows = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, expected = line.split(maxsplit=1)
        if name.endswith("{weight,bias}"):
            stem = name.removesuffix("{weight,bias}")
            rows |= {f"{stem}weight": expected, f"{stem}bias": "bias"}
        else:
            rows[name] = expected
    return rows


def llama(head_size: int, attention: str = "", head: str = "lm_head.weight head") -> dict[str, str]:
    """Llama's layout, which most decoders share."""
    text = f"""
        model.embed_tokens.weight                           embedding
        model.layers.0.self_attn.q_proj.weight              query_key {head_size}
        model.layers.0.self_attn.k_proj.weight              query_key {head_size}
        model.layers.0.self_attn.v_proj.weight              matrix
        model.layers.0.self_attn.o_proj.weight              matrix
        model.layers.0.mlp.gate_proj.weight                 matrix
        model.layers.0.mlp.up_proj.weight                   matrix
        model.layers.0.mlp.down_proj.weight                 matrix
        model.layers.0.input_layernorm.weight               norm
        model.layers.0.post_attention_layernorm.weight      norm
        model.norm.weight                                   norm
    """
    return table(text + attention + "\n" + head)


QWEN2_BIASES = """
    model.layers.0.self_attn.q_proj.bias        bias
    model.layers.0.self_attn.k_proj.bias        bias
    model.layers.0.self_attn.v_proj.bias        bias
"""
QWEN3_NORMS = """
    model.layers.0.self_attn.q_norm.weight      norm
    model.layers.0.self_attn.k_norm.weight      norm
"""
# Conv1D stores [inputs, outputs] and holds queries, keys and values in one: no heads. The head is tied to wte.
GPT2 = """
    transformer.wte.weight                      embedding
    transformer.wpe.weight                      embedding
    transformer.h.0.ln_1.{weight,bias}          norm
    transformer.h.0.attn.c_attn.{weight,bias}   matrix
    transformer.h.0.attn.c_proj.{weight,bias}   matrix
    transformer.h.0.ln_2.{weight,bias}          norm
    transformer.h.0.mlp.c_fc.{weight,bias}      matrix
    transformer.h.0.mlp.c_proj.{weight,bias}    matrix
    transformer.ln_f.{weight,bias}              norm
"""
GPT_NEOX = """
    gpt_neox.embed_in.weight                                    embedding
    gpt_neox.layers.0.input_layernorm.{weight,bias}             norm
    gpt_neox.layers.0.post_attention_layernorm.{weight,bias}    norm
    gpt_neox.layers.0.attention.query_key_value.{weight,bias}   matrix
    gpt_neox.layers.0.attention.dense.{weight,bias}             matrix
    gpt_neox.layers.0.mlp.dense_h_to_4h.{weight,bias}           matrix
    gpt_neox.layers.0.mlp.dense_4h_to_h.{weight,bias}           matrix
    gpt_neox.final_layer_norm.{weight,bias}                     norm
    lm_head.weight                                              head
"""
PHI3 = """
    model.embed_tokens.weight                           embedding
    model.layers.0.self_attn.o_proj.weight              matrix
    model.layers.0.self_attn.qkv_proj.weight            matrix
    model.layers.0.mlp.gate_up_proj.weight              matrix
    model.layers.0.mlp.down_proj.weight                 matrix
    model.layers.0.input_layernorm.weight               norm
    model.layers.0.post_attention_layernorm.weight      norm
    model.norm.weight                                   norm
    lm_head.weight                                      head
"""
BERT = """
    bert.embeddings.word_embeddings.weight                          embedding
    bert.embeddings.position_embeddings.weight                      embedding
    bert.embeddings.token_type_embeddings.weight                    embedding
    bert.embeddings.LayerNorm.{weight,bias}                         norm
    bert.encoder.layer.0.attention.self.query.{weight,bias}         query_key 8
    bert.encoder.layer.0.attention.self.key.{weight,bias}           query_key 8
    bert.encoder.layer.0.attention.self.value.{weight,bias}         matrix
    bert.encoder.layer.0.attention.output.dense.{weight,bias}       matrix
    bert.encoder.layer.0.attention.output.LayerNorm.{weight,bias}   norm
    bert.encoder.layer.0.intermediate.dense.{weight,bias}           matrix
    bert.encoder.layer.0.output.dense.{weight,bias}                 matrix
    bert.encoder.layer.0.output.LayerNorm.{weight,bias}             norm
"""
# The decoder's bias is tied to cls.predictions.bias, a module without a weight: the Linear's role counts.
BERT_LM_HEAD = """
    cls.predictions.bias                                    bias
    cls.predictions.transform.dense.{weight,bias}           matrix
    cls.predictions.transform.LayerNorm.{weight,bias}       norm
"""
# As many labels as token types, but transformers says that there is no output embedding.
BERT_CLASSIFIER = """
    bert.pooler.dense.{weight,bias}     matrix
    classifier.{weight,bias}            matrix
"""
T5 = """
    shared.weight                                                           embedding
    encoder.block.0.layer.0.SelfAttention.q.weight                          query_key 16
    encoder.block.0.layer.0.SelfAttention.k.weight                          query_key 16
    encoder.block.0.layer.0.SelfAttention.v.weight                          matrix
    encoder.block.0.layer.0.SelfAttention.o.weight                          matrix
    encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight    embedding
    encoder.block.0.layer.0.layer_norm.weight                               norm
    encoder.block.0.layer.1.DenseReluDense.wi.weight                        matrix
    encoder.block.0.layer.1.DenseReluDense.wo.weight                        matrix
    encoder.block.0.layer.1.layer_norm.weight                               norm
    encoder.final_layer_norm.weight                                         norm
    decoder.block.0.layer.0.SelfAttention.q.weight                          query_key 16
    decoder.block.0.layer.0.SelfAttention.k.weight                          query_key 16
    decoder.block.0.layer.0.SelfAttention.v.weight                          matrix
    decoder.block.0.layer.0.SelfAttention.o.weight                          matrix
    decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight    embedding
    decoder.block.0.layer.0.layer_norm.weight                               norm
    decoder.block.0.layer.1.EncDecAttention.q.weight                        query_key 16
    decoder.block.0.layer.1.EncDecAttention.k.weight                        query_key 16
    decoder.block.0.layer.1.EncDecAttention.v.weight                        matrix
    decoder.block.0.layer.1.EncDecAttention.o.weight                        matrix
    decoder.block.0.layer.1.layer_norm.weight                               norm
    decoder.block.0.layer.2.DenseReluDense.wi.weight                        matrix
    decoder.block.0.layer.2.DenseReluDense.wo.weight                        matrix
    decoder.block.0.layer.2.layer_norm.weight                               norm
    decoder.final_layer_norm.weight                                         norm
"""
OPT = """
    model.decoder.embed_tokens.weight                               embedding
    model.decoder.embed_positions.weight                            embedding
    model.decoder.final_layer_norm.{weight,bias}                    norm
    model.decoder.layers.0.self_attn.k_proj.{weight,bias}           query_key 8
    model.decoder.layers.0.self_attn.v_proj.{weight,bias}           matrix
    model.decoder.layers.0.self_attn.q_proj.{weight,bias}           query_key 8
    model.decoder.layers.0.self_attn.out_proj.{weight,bias}         matrix
    model.decoder.layers.0.self_attn_layer_norm.{weight,bias}       norm
    model.decoder.layers.0.fc1.{weight,bias}                        matrix
    model.decoder.layers.0.fc2.{weight,bias}                        matrix
    model.decoder.layers.0.final_layer_norm.{weight,bias}           norm
"""
DISTILBERT = """
    embeddings.word_embeddings.weight                       embedding
    embeddings.position_embeddings.weight                   embedding
    embeddings.LayerNorm.{weight,bias}                      norm
    transformer.layer.0.attention.q_lin.{weight,bias}       query_key 8
    transformer.layer.0.attention.k_lin.{weight,bias}       query_key 8
    transformer.layer.0.attention.v_lin.{weight,bias}       matrix
    transformer.layer.0.attention.out_lin.{weight,bias}     matrix
    transformer.layer.0.sa_layer_norm.{weight,bias}         norm
    transformer.layer.0.ffn.lin1.{weight,bias}              matrix
    transformer.layer.0.ffn.lin2.{weight,bias}              matrix
    transformer.layer.0.output_layer_norm.{weight,bias}     norm
"""
# Multi-head latent attention: the query's heads have 24 rows, while head_dim is 8, the part that is rotated.
DEEPSEEK_V2 = """
    model.embed_tokens.weight                               embedding
    model.layers.0.self_attn.q_proj.weight                  matrix
    model.layers.0.self_attn.kv_a_proj_with_mqa.weight      matrix
    model.layers.0.self_attn.kv_a_layernorm.weight          norm
    model.layers.0.self_attn.kv_b_proj.weight               matrix
    model.layers.0.self_attn.o_proj.weight                  matrix
    model.layers.0.mlp.gate_proj.weight                     matrix
    model.layers.0.mlp.up_proj.weight                       matrix
    model.layers.0.mlp.down_proj.weight                     matrix
    model.layers.0.input_layernorm.weight                   norm
    model.layers.0.post_attention_layernorm.weight          norm
    model.norm.weight                                       norm
    lm_head.weight                                          head
"""
ENCODER_LAYER = """
    self_attn.in_proj_weight            matrix
    self_attn.in_proj_bias              bias
    self_attn.out_proj.{weight,bias}    matrix
    linear1.{weight,bias}               matrix
    linear2.{weight,bias}               matrix
    norm1.{weight,bias}                 norm
    norm2.{weight,bias}                 norm
"""
UNEQUAL_ATTENTION = """
    q_proj_weight               query_key 8
    k_proj_weight               query_key 8
    v_proj_weight               matrix
    in_proj_bias                bias
    bias_k                      matrix
    bias_v                      matrix
    out_proj.{weight,bias}      matrix
"""
GPT_EXAMPLE = """
    embedding.weight                    embedding
    position.weight                     embedding
    blocks.0.attention_norm.weight      norm
    blocks.0.attention.qkv.weight       matrix
    blocks.0.attention.out.weight       matrix
    blocks.0.feed_norm.weight           norm
    blocks.0.up.weight                  matrix
    blocks.0.down.weight                matrix
    norm.weight                         norm
    head.weight                         head
"""


def of_transformers(name: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    """Builds a model of transformers with its own configuration class."""
    return lambda: resolve_name(f"transformers.{name}")(resolve_name(f"transformers.{config}")(**sizes))


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "llama": (of_transformers("LlamaForCausalLM", "LlamaConfig", **GROUPED), llama(8)),
    "mistral": (of_transformers("MistralForCausalLM", "MistralConfig", **GROUPED), llama(8)),
    "qwen2, tied": (
        of_transformers("Qwen2ForCausalLM", "Qwen2Config", **GROUPED, tie_word_embeddings=True),
        llama(8, QWEN2_BIASES, head=""),
    ),
    "qwen3, wide heads": (
        of_transformers("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=16),
        llama(16, QWEN3_NORMS),
    ),
    "gemma, tied, wide heads": (
        of_transformers("GemmaForCausalLM", "GemmaConfig", **GROUPED, head_dim=16),
        llama(16, head=""),
    ),
    "gpt2": (
        of_transformers("GPT2LMHeadModel", "GPT2Config", n_embd=WIDTH, n_layer=1, n_head=HEADS, vocab_size=VOCABULARY),
        table(GPT2),
    ),
    "gpt-neox": (of_transformers("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES), table(GPT_NEOX)),
    "phi3": (of_transformers("Phi3ForCausalLM", "Phi3Config", **GROUPED, pad_token_id=0), table(PHI3)),
    "bert": (of_transformers("BertForMaskedLM", "BertConfig", **SIZES), table(BERT + BERT_LM_HEAD)),
    "bert, classifier": (
        of_transformers("BertForSequenceClassification", "BertConfig", **SIZES, num_labels=2, type_vocab_size=2),
        table(BERT + BERT_CLASSIFIER),
    ),
    "distilbert": (
        of_transformers(
            "DistilBertModel",
            "DistilBertConfig",
            dim=WIDTH,
            n_layers=1,
            n_heads=HEADS,
            hidden_dim=64,
            vocab_size=VOCABULARY,
        ),
        table(DISTILBERT),
    ),
    "t5": (
        of_transformers(
            "T5ForConditionalGeneration",
            "T5Config",
            d_model=WIDTH,
            d_kv=16,
            d_ff=64,
            num_layers=1,
            num_heads=HEADS,
            vocab_size=VOCABULARY,
        ),
        table(T5),
    ),
    "opt": (
        of_transformers(
            "OPTForCausalLM", "OPTConfig", **SIZES, ffn_dim=64, word_embed_proj_dim=WIDTH, max_position_embeddings=16
        ),
        table(OPT),
    ),
    "deepseek-v2": (
        of_transformers(
            "DeepseekV2ForCausalLM",
            "DeepseekV2Config",
            **SIZES,
            q_lora_rank=None,
            first_k_dense_replace=1,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=8,
            kv_lora_rank=8,
        ),
        table(DEEPSEEK_V2),
    ),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(WIDTH, HEADS), table(ENCODER_LAYER)),
    "attention, keys of another width": (
        lambda: nn.MultiheadAttention(WIDTH, HEADS, kdim=12, vdim=20, add_bias_kv=True),
        table(UNEQUAL_ATTENTION),
    ),
    "example": (lambda: GPT(GPTConfig(width=24, layers=1)), table(GPT_EXAMPLE)),
}


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


@pytest.mark.peer
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_the_role_its_module_declares(name: str) -> None:
    build, expected = MODELS[name]
    assert roles_of(on_meta(build)) == expected


@pytest.mark.peer
@pytest.mark.parametrize("name", MODELS)
def test_groups_hold_every_parameter_once_in_a_fixed_order_and_any_recipe_takes_them(name: str) -> None:
    model = on_meta(MODELS[name][0])
    groups = declare_roles(model)
    assert len(groups) == len({(group["role"], group.get("head_size")) for group in groups})
    order = ["embedding", "head", "query_key", "norm", "bias", "matrix", "vector"]
    assert [group["role"] for group in groups] == [role for role in order if role in {g["role"] for g in groups}]
    names = list(dict(model.named_parameters()))
    listed = [name for group in groups for name, _ in group["params"]]
    assert sorted(listed) == sorted(names)
    for group in groups:
        in_group = {name for name, _ in group["params"]}
        assert [name for name, _ in group["params"]] == [name for name in names if name in in_group]
        assert all(param is model.get_parameter(name) for name, param in group["params"])
    optimizer = recipes.AdamW(groups)
    planned = {plan.spec.name: (plan.spec.role, plan.spec.head_size) for plan in optimizer.plan()}
    assert planned == {n: (g["role"], g.get("head_size")) for g in groups for n, _ in g["params"]}
    again = declare_roles(model)
    assert [(g["role"], [n for n, _ in g["params"]]) for g in again] == [
        (g["role"], [n for n, _ in g["params"]]) for g in groups
    ]


class Attention(nn.Module):
    """Queries and keys under names and head attributes of choice."""

    def __init__(self, names: tuple[str, str], rows: tuple[int, int] = (12, 12), **attributes: Any) -> None:
        super().__init__()
        for name, count in zip(names, rows, strict=True):
            setattr(self, name, nn.Linear(12, count, bias=False))
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    "names",
    [
        ("q_proj", "k_proj"),
        ("query", "key"),
        ("wq", "wk"),
        ("to_q", "to_k"),
        ("q_lin", "k_lin"),
        ("q", "k"),
        ("query_proj", "key_proj"),
        ("linear_q", "linear_k"),
    ],
)
@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ({"head_dim": 6}, 6),
        ({"attention_head_size": 4}, 4),
        ({"num_heads": 3}, 4),
        ({"num_attention_heads": 2}, 6),
        ({"n_heads": 4}, 3),
        ({"n_head": 6}, 2),
        ({"heads": 1}, 12),
        ({"head_dim": 4, "num_heads": 6}, 4),  # the size itself is declared: the count is not needed
        ({"head_dim": None, "num_heads": 3}, 4),
    ],
)
def test_heads_are_declared_by_attributes(names: tuple[str, str], attributes: dict[str, Any], size: int) -> None:
    expected = {f"layer.{name}.weight": f"query_key {size}" for name in names}
    assert roles_of(nn.ModuleDict({"layer": Attention(names, **attributes)})) == expected


@pytest.mark.parametrize(
    "model",
    [
        Attention(("q_proj", "k_proj")),
        Attention(("q_proj", "k_proj"), num_heads=True),
        Attention(("q_proj", "k_proj"), num_heads=0),
        Attention(("q_proj", "k_proj"), num_heads=-3),
        Attention(("q_proj", "k_proj"), num_heads=3.0),
        Attention(("q_proj", "v_proj"), num_heads=3),
        Attention(("k_proj", "v_proj"), num_heads=3),
        Attention(("q_proj", "key"), num_heads=3),
        Attention(("my_q_proj", "my_k_proj"), num_heads=3),
        Attention(("query_norm", "key_norm"), num_heads=3),
    ],
    ids=lambda model: ", ".join([*dict(model.named_children()), *(k for k in vars(model) if "heads" in k)]),
)
def test_nothing_is_guessed(model: nn.Module) -> None:
    assert set(roles_of(model).values()) == {"matrix"}


def test_queries_and_keys_must_be_linear() -> None:
    """Of another module it is not known that the rows of its weight are outputs."""
    attention = Attention(("q_proj", "k_proj"), num_heads=3)
    attention.k_proj = nn.Conv1d(12, 12, 1, bias=False)
    assert set(roles_of(attention).values()) == {"matrix"}


def test_a_parametrized_projection_has_no_weight_to_declare() -> None:
    attention = Attention(("q_proj", "k_proj"), num_heads=3)
    nn.utils.parametrizations.weight_norm(attention.q_proj)
    assert set(roles_of(attention).values()) == {"matrix"}
    assert len(roles_of(attention)) == 3


def test_heads_of_two_sizes_come_in_two_groups() -> None:
    model = nn.Sequential(*(Attention(("wq", "wk"), num_heads=count) for count in (2, 3, 2)))
    groups = declare_roles(model)
    assert [(group["role"], group["head_size"]) for group in groups] == [("query_key", 6), ("query_key", 4)]
    assert [name for name, _ in groups[0]["params"]] == ["0.wq.weight", "0.wk.weight", "2.wq.weight", "2.wk.weight"]


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (
            Attention(("q_proj", "k_proj"), head_dim=5),
            r"'layer\.q_proj\.weight' of shape \(12, 12\) cannot be split into heads of 5 rows, "
            r"as Attention declares by head_dim=5: correct the attribute",
        ),
        (
            Attention(("query", "key"), (12, 10), num_heads=3),
            r"'layer\.key\.weight' of shape \(10, 12\) cannot be split into heads of 4 rows, "
            r"as Attention declares by num_heads=3",
        ),
        (
            Attention(("wq", "wk"), n_head=5),
            r"'layer\.wq\.weight' of shape \(12, 12\) cannot be split into 5 equal heads, "
            r"as Attention declares by n_head=5",
        ),
    ],
    ids=["head size", "keys", "count"],
)
def test_heads_that_do_not_divide_the_rows_are_refused(attention: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        declare_roles(nn.ModuleDict({"layer": attention}))


def test_the_error_names_a_parameter_of_the_root_without_a_dot() -> None:
    with pytest.raises(ValueError, match=r"^'wq\.weight' of shape"):
        declare_roles(Attention(("wq", "wk"), head_dim=5))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_tied_head_is_an_embedding_and_comes_once(wrapped: bool) -> None:
    model: Any = GPT(GPTConfig(width=24, layers=1, tied=True))
    expected = {name: role for name, role in table(GPT_EXAMPLE).items() if name != "head.weight"}
    if wrapped:
        model, expected = torch.compile(model), {f"_orig_mod.{name}": role for name, role in expected.items()}
    assert roles_of(model) == expected


def test_the_head_is_found_behind_wrappers() -> None:
    """`torch.compile` and a training module have one child each and nothing of their own."""
    model = GPT(GPTConfig(width=24, layers=1))
    assert roles_of(torch.compile(model))["_orig_mod.head.weight"] == "head"
    assert roles_of(nn.ModuleDict({"model": torch.compile(model)}))["model._orig_mod.head.weight"] == "head"
    llama_model = on_meta(MODELS["llama"][0])
    assert roles_of(nn.ModuleDict({"policy": llama_model, "value": nn.Linear(4, 1)}))["policy.lm_head.weight"] == "head"


@pytest.mark.parametrize(
    ("layers", "head"),
    [
        ([nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)], "2.weight"),
        ([nn.EmbeddingBag(7, 4), nn.Linear(4, 7)], "1.weight"),
        ([nn.Embedding(7, 4), nn.Linear(4, 7), nn.Linear(7, 4)], None),  # not the last
        ([nn.Embedding(7, 4), nn.Linear(4, 8)], None),  # no embedding of eight
        ([nn.Embedding(7, 4), nn.Sequential(nn.Linear(4, 7))], None),  # not directly under the root
        ([nn.Linear(4, 7), nn.Linear(7, 7)], None),  # no embedding at all
    ],
)
def test_a_head_without_get_output_embeddings(layers: list[nn.Module], head: str | None) -> None:
    found = [name for name, role in roles_of(nn.Sequential(*layers)).items() if role == "head"]
    assert found == ([head] if head else [])


class Scale(nn.Module):
    """A module with parameters of chosen names and shapes, and children."""

    def __init__(self, children: tuple[nn.Module, ...] = (), **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))
        for i, child in enumerate(children):
            self.add_module(f"child{i}", child)


def test_a_module_with_parameters_of_its_own_is_no_wrapper() -> None:
    inner = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    assert roles_of(nn.Sequential(inner))["0.1.weight"] == "head"
    assert roles_of(Scale((inner,), position=(3, 4)))["child0.1.weight"] == "matrix"


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LayerNorm(4), {"weight": "norm", "bias": "bias"}),
        (nn.LayerNorm((3, 4)), {"weight": "norm", "bias": "bias"}),
        (nn.RMSNorm(4), {"weight": "norm"}),
        (nn.GroupNorm(2, 4), {"weight": "norm", "bias": "bias"}),
        (nn.BatchNorm2d(4), {"weight": "norm", "bias": "bias"}),
        (nn.InstanceNorm1d(4, affine=True), {"weight": "norm", "bias": "bias"}),
        (Scale(weight=(4,)), {"weight": "norm"}),
        (Scale(weight=(4,), bias=(4,)), {"weight": "norm", "bias": "bias"}),
        (Scale((nn.ReLU(),), weight=(4,)), {"weight": "vector"}),
        (Scale(gamma=(4,)), {"gamma": "vector"}),
        (Scale(weight=(4,), temperature=()), {"weight": "vector", "temperature": "vector"}),
        (Scale(weight=(2, 4)), {"weight": "matrix"}),
        (Scale(bias=(4,)), {"bias": "vector"}),
        (Scale(weight=()), {"weight": "vector"}),
        (nn.PReLU(4), {"weight": "vector"}),
        (Scale(weight=(2, 4), bias=(4,)), {"weight": "matrix", "bias": "bias"}),
        (Scale(weight=(2, 4), bias=(2, 4)), {"weight": "matrix", "bias": "matrix"}),
        (Scale(weight=(2, 4), shift_bias=(4,)), {"weight": "matrix", "shift_bias": "vector"}),
        (nn.Conv2d(3, 4, 2), {"weight": "matrix", "bias": "bias"}),
        (nn.ConvTranspose1d(3, 4, 2), {"weight": "matrix", "bias": "bias"}),
        (nn.Bilinear(3, 4, 2), {"weight": "matrix", "bias": "bias"}),
        (nn.EmbeddingBag(3, 4), {"weight": "embedding"}),
        (
            nn.RNN(3, 4),
            {"weight_ih_l0": "matrix", "weight_hh_l0": "matrix", "bias_ih_l0": "vector", "bias_hh_l0": "vector"},
        ),
    ],
    ids=lambda item: type(item).__name__ if isinstance(item, nn.Module) else ", ".join(item),
)
def test_norms_and_biases_are_told_by_structure(module: nn.Module, expected: dict[str, str]) -> None:
    assert roles_of(module) == expected


def test_a_normalised_weight_leaves_the_bias_a_bias() -> None:
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    assert roles_of(linear)["bias"] == "bias"


def test_frozen_parameters_are_declared_like_others() -> None:
    model = GPT(GPTConfig(width=24, layers=1))
    model.position.requires_grad_(False)
    assert roles_of(model) == table(GPT_EXAMPLE)
    optimizer = recipes.AdamW(declare_roles(model))
    frozen = [plan.spec.name for plan in optimizer.plan() if not plan.trainable]
    assert frozen == ["position.weight"]


def test_a_shared_module_is_declared_once() -> None:
    attention = Attention(("wq", "wk"), num_heads=3)
    assert list(roles_of(nn.ModuleList([attention, attention]))) == ["0.wq.weight", "0.wk.weight"]


def test_packed_weights_do_not_stop_the_rest() -> None:
    """A 4-bit layer's weight is a column of bytes; it is frozen, and the caller leaves it out."""
    attention = Attention(("q_proj", "k_proj"), head_dim=5)
    for child in (attention.q_proj, attention.k_proj):
        child.weight = nn.Parameter(torch.zeros(72, 1, dtype=torch.uint8), requires_grad=False)
    assert set(roles_of(attention).values()) == {"matrix"}


def test_only_a_module_has_roles() -> None:
    with pytest.raises(TypeError, match="got a generator: give the model itself"):
        declare_roles(nn.Linear(2, 2).parameters())  # type: ignore[arg-type]
