"""Which projections are the sites of which model family, proven on what flows through them."""

from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from eigenwatch.agent import FoundLayer, find_layers, register_family
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, MODEL_DIM, WIDTH = 32, 16, 24
BOTH = ("post", "pre")


def hugging_face(name: str, **config: Any) -> nn.Module:
    """A randomly initialised two-layer model of the real class."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": MODEL_DIM, "intermediate_size": WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    built = getattr(transformers, f"{name}Config")(**{**sizes, **config})
    model = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM"))(built)
    for parameter in model.parameters():  # the usual 0.02 would leave every activation near its linear part
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


class Case(NamedTuple):
    """What a family must be found to be: `{}` is the layer."""

    family: str
    post: str
    pre: str
    activation: Callable[[Tensor], Tensor]
    up: str | None = None
    """The up projection of a gated feed-forward; where it is `pre`, the second half of its output."""
    config: Mapping[str, Any] = MappingProxyType({})


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


MLP = "model.layers.{}.mlp."
SWIGLU = (MLP + "down_proj", MLP + "gate_proj", F.silu, MLP + "up_proj")
GEGLU = (MLP + "down_proj", MLP + "gate_proj", tanh_gelu, MLP + "up_proj")
DENSE = [
    Case("Llama", *SWIGLU),
    Case("Mistral", *SWIGLU),
    Case("Qwen2", *SWIGLU),
    Case("Qwen3", *SWIGLU),
    Case("Gemma", *GEGLU),
    Case("Gemma2", *GEGLU),
    Case("Phi", MLP + "fc2", MLP + "fc1", tanh_gelu),
    Case("Phi3", MLP + "down_proj", MLP + "gate_up_proj", F.silu, MLP + "gate_up_proj"),
    Case("GPT2", "transformer.h.{}.mlp.c_proj", "transformer.h.{}.mlp.c_fc", tanh_gelu,
         config={"n_embd": MODEL_DIM, "n_inner": WIDTH, "n_layer": 2, "n_head": 2}),
    Case("GPTNeoX", "gpt_neox.layers.{}.mlp.dense_4h_to_h", "gpt_neox.layers.{}.mlp.dense_h_to_4h", F.gelu),
    Case("OPT", "model.decoder.layers.{}.fc2", "model.decoder.layers.{}.fc1", F.relu,
         config={"ffn_dim": WIDTH, "word_embed_proj_dim": MODEL_DIM}),
]  # fmt: skip


def observe(model: nn.Module, found: list[FoundLayer]) -> dict[tuple[int, str], Tensor]:
    """What each site sees in one forward, by layer and site."""
    seen: dict[tuple[int, str], Tensor] = {}
    for one in found:
        if one.site == "post":
            one.module.register_forward_pre_hook(lambda _, x, key=(one.layer, "post"): seen.update({key: x[0]}))
        else:
            columns = slice(*(one.columns or (None,)))
            one.module.register_forward_hook(
                lambda _, x, y, key=(one.layer, "pre"), columns=columns: seen.update({key: y[..., columns]})
            )
    with torch.no_grad():
        model(torch.arange(10).view(2, 5))
    return seen


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.family)
def test_the_activation_lies_between_the_sites(case):
    model = hugging_face(case.family, **case.config)
    found = find_layers(model, sites=BOTH)
    assert [(one.layer, one.site, one.name, one.width, one.expert) for one in found] == [
        (layer, site, name.format(layer), WIDTH, None)
        for layer in range(2)
        for site, name in (("post", case.post), ("pre", case.pre))
    ]
    assert all(model.get_submodule(one.name) is one.module for one in found)
    ups: dict[int, Tensor] = {}
    for layer in range(2) if case.up else ():
        module = model.get_submodule(case.up.format(layer))
        module.register_forward_hook(lambda _, x, y, layer=layer: ups.update({layer: y[..., -WIDTH:]}))
    seen = observe(model, found)
    for layer in range(2):
        post, pre = seen[layer, "post"], seen[layer, "pre"]
        assert post.shape[-1] == pre.shape[-1] == WIDTH
        torch.testing.assert_close(post, case.activation(pre) * ups.get(layer, torch.ones(())))


def test_only_a_fused_gate_and_up_projection_is_observed_in_part():
    assert [one.columns for one in find_layers(hugging_face("Phi3"), sites=BOTH)] == [None, (0, WIDTH)] * 2
    assert [one.columns for one in find_layers(hugging_face("Qwen3"), sites=BOTH)] == [None, None] * 2


def test_either_site_may_be_asked_for_alone():
    model = hugging_face("Llama")
    assert [one.site for one in find_layers(model)] == ["post", "post"]
    assert [one.site for one in find_layers(model, sites=("pre",))] == ["pre", "pre"]
    assert [one.site for one in find_layers(model, [1], sites=("pre", "post"))] == ["post", "pre"]


def deepseek() -> nn.Module:
    return hugging_face(
        "DeepseekV3", num_hidden_layers=3, first_k_dense_replace=1, moe_intermediate_size=12, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=2, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: hugging_face("Mixtral", num_local_experts=4), r"model.layers.N.mlp.experts \(layer 0-1\)"),
        (lambda: hugging_face("Qwen3Moe", num_experts=4, moe_intermediate_size=12), r"layers.N.mlp.experts"),
        (deepseek, r"model.layers.N.mlp.experts \(layer 1-2\).*agent.observe.*layers=\[0\]"),
    ],
)
def test_fused_experts_are_refused_with_the_remedy(build, words):
    with pytest.raises(ValueError, match=words) as refused:
        find_layers(build(), required=False)
    assert "agent.observe(x, layer=, site=, expert=)" in str(refused.value)


def test_the_dense_layers_beside_fused_experts_can_be_chosen():
    model = deepseek()
    assert [(one.layer, one.width) for one in find_layers(model, [0])] == [(0, WIDTH)]
    with pytest.raises(ValueError, match=r"\(layer 2\)"):
        find_layers(model, [0, 2])


def test_who_observes_fused_experts_by_hand_gets_all_the_rest_the_shared_expert_too():
    found = find_layers(deepseek(), fused="skip")
    assert [(one.layer, one.name, one.width, one.expert) for one in found] == [
        (0, "model.layers.0.mlp.down_proj", WIDTH, None),
        (1, "model.layers.1.mlp.shared_experts.down_proj", 2 * 12, None),
        (2, "model.layers.2.mlp.shared_experts.down_proj", 2 * 12, None),
    ]
    assert find_layers(hugging_face("Mixtral", num_local_experts=4), fused="skip") == []


def tree(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def layers(*blocks: nn.Module) -> nn.Module:
    return tree(layers=nn.ModuleList(blocks))


def linears(width: int, **names: bool) -> nn.Module:
    """Linear modules by name: true for a down-projection."""
    return tree(**{k: nn.Linear(width, 8) if down else nn.Linear(8, width) for k, down in names.items()})


def experts(width: int, **names: bool) -> nn.ModuleList:
    return nn.ModuleList(linears(width, **names) for _ in range(2))


@pytest.mark.parametrize(
    ("block", "post", "pre"),
    [
        (tree(block_sparse_moe=tree(experts=experts(12, w1=False, w2=True, w3=False))),
         "layers.0.block_sparse_moe.experts.{}.w2", "layers.0.block_sparse_moe.experts.{}.w1"),
        (tree(mlp=tree(experts=experts(12, gate_proj=False, up_proj=False, down_proj=True))),
         "layers.0.mlp.experts.{}.down_proj", "layers.0.mlp.experts.{}.gate_proj"),
    ],
    ids=["Mixtral before transformers 5", "DeepSeek"],
)  # fmt: skip
def test_experts_with_modules_of_their_own_are_found_one_by_one(block, post, pre):
    assert [(one.expert, one.site, one.name, one.width) for one in find_layers(layers(block), sites=BOTH)] == [
        (expert, site, name.format(expert), 12) for expert in range(2) for site, name in (("post", post), ("pre", pre))
    ]


def test_the_shared_expert_comes_before_the_routed_ones_as_the_dense_part_of_its_layer():
    names = {"gate_proj": False, "down_proj": True}
    mixture = tree(experts=experts(12, **names), shared_experts=linears(20, **names))
    found = find_layers(layers(tree(mlp=mixture)))
    assert [(one.layer, one.expert, one.width) for one in found] == [(0, None, 20), (0, 0, 12), (0, 1, 12)]


# torchtitan/models/common/feed_forward.py and moe.py: FeedForward has w1, w2, w3; GroupedExperts has 3-D parameters.
def torchtitan_experts(*names: str) -> nn.Module:
    module = nn.Module()
    for name in names:
        module.register_parameter(name, nn.Parameter(torch.zeros(2, 8, 12)))
    return module


@pytest.mark.parametrize(
    "routed",
    [
        {"experts": torchtitan_experts("w1", "w2", "w3")},
        {"routed_experts": tree(inner_experts=torchtitan_experts("w1_EFD", "w2_EDF", "w3_EFD"))},
        {"bank": torchtitan_experts("w1_EFD", "w2_EDF", "w3_EFD")},
    ],
)
def test_torchtitan_names_are_found_and_its_grouped_experts_refused(routed):
    feed_forward = {"w1": False, "w2": True, "w3": False}
    model = tree(
        layers=nn.ModuleDict(
            {
                "0": tree(feed_forward=linears(24, **feed_forward)),
                "1": tree(moe=tree(shared_experts=linears(12, **feed_forward), **routed)),
            }
        ),
        mtp_layers=nn.ModuleList([tree(feed_forward=linears(24, **feed_forward))]),
    )
    assert [(one.site, one.name, one.width) for one in find_layers(model, sites=BOTH, fused="skip")] == [
        ("post", "layers.0.feed_forward.w2", 24), ("pre", "layers.0.feed_forward.w1", 24),
        ("post", "layers.1.moe.shared_experts.w2", 12), ("pre", "layers.1.moe.shared_experts.w1", 12),
    ]  # fmt: skip
    assert [one.layer for one in find_layers(model, [0])] == [0]
    with pytest.raises(ValueError, match=rf"layers.N.moe.{next(iter(routed))} \(layer 1\)"):
        find_layers(model)


class RowParallel(nn.Module):
    """The attributes of megatron/core/tensor_parallel/layers.py: RowParallelLinear, on one of two ranks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_size, self.input_size_per_partition, self.output_size = width, width // 2, 8
        self.weight = nn.Parameter(torch.zeros(8, width // 2))


class ColumnParallel(nn.Module):
    """Its ColumnParallelLinear: a gated linear unit doubles the output, gate before up on each rank."""

    def __init__(self, width: int, gated: bool) -> None:
        super().__init__()
        outputs = 2 * width if gated else width
        self.input_size, self.output_size, self.output_size_per_partition = 8, outputs, outputs // 2
        self.config = SimpleNamespace(gated_linear_unit=gated)
        self.weight = nn.Parameter(torch.zeros(outputs // 2, 8))


class TransformerEngineLinear(nn.Linear):
    """What Megatron's TELinear keeps on one of two ranks: the features of the shard, and the configuration."""

    def __init__(self, features: tuple[int, int], width: int, gated: bool) -> None:
        super().__init__(*features)
        self.config = SimpleNamespace(gated_linear_unit=gated, ffn_hidden_size=width)


def megatron(width: int, gated: bool = True) -> nn.Module:
    return tree(linear_fc1=ColumnParallel(width, gated), linear_fc2=RowParallel(width))


def numbered(mlp: nn.Module, layer_number: int) -> nn.Module:
    layer = tree(mlp=mlp)
    layer.layer_number = layer_number
    return layer


@pytest.mark.parametrize(("gated", "columns"), [(True, (0, 12)), (False, None)])
def test_megatron_layers_have_their_whole_width_and_the_gate_in_the_first_half_of_each_shard(gated, columns):
    engine = tree(
        linear_fc1=TransformerEngineLinear((8, 24 if gated else 12), 24, gated),
        linear_fc2=TransformerEngineLinear((12, 8), 24, gated),
    )
    for mlp in (megatron(24, gated), engine):
        assert [
            (one.name, one.width, one.site, one.columns)
            for one in find_layers(tree(decoder=layers(tree(mlp=mlp))), sites=BOTH)
        ] == [
            ("decoder.layers.0.mlp.linear_fc2", 24, "post", None),
            ("decoder.layers.0.mlp.linear_fc1", 24, "pre", columns),
        ]


def test_megatron_layers_and_experts_are_numbered_globally_though_their_paths_are_not():
    mixture = tree(experts=tree(local_experts=nn.ModuleList([megatron(12), megatron(12)])), shared_experts=megatron(16))
    mixture.local_expert_indices = [2, 3]
    stage = tree(module=tree(decoder=layers(numbered(megatron(24), 5), numbered(mixture, 6))))
    assert [(one.layer, one.expert, one.name, one.width) for one in find_layers(stage)] == [
        (4, None, "decoder.layers.0.mlp.linear_fc2", 24),
        (5, None, "decoder.layers.1.mlp.shared_experts.linear_fc2", 16),
        (5, 2, "decoder.layers.1.mlp.experts.local_experts.0.linear_fc2", 12),
        (5, 3, "decoder.layers.1.mlp.experts.local_experts.1.linear_fc2", 12),
    ]
    assert [one.layer for one in find_layers(stage, [4])] == [4]


def test_megatron_grouped_experts_are_refused_and_its_token_prediction_layers_left_out():
    def grouped() -> nn.Module:  # TEGroupedMLP: one parameter for each expert in each projection
        weights = {f"weight{k}": nn.Parameter(torch.zeros(8, 12)) for k in range(2)}
        return tree(experts=tree(linear_fc1=nn.ParameterDict(weights), linear_fc2=nn.ParameterDict(weights)))

    prediction = layers(tree(mtp_model_layer=tree(mlp=grouped())))
    model = tree(decoder=layers(numbered(megatron(24), 3), numbered(grouped(), 4)), mtp=prediction)
    with pytest.raises(ValueError, match=r"^decoder.layers.N.mlp.experts \(layer 3\).*layers=\[2\]"):
        find_layers(model)
    assert [one.layer for one in find_layers(model, [2])] == [2]


def mine() -> nn.Module:
    return tree(blocks=nn.ModuleList(tree(ffn=linears(24, inp=False, out=True)) for _ in range(2)))


def test_a_registered_family_is_found_like_a_built_in_one():
    with pytest.raises(ValueError, match=r"register_family.*candidates: blocks.N.ffn.out"):
        find_layers(mine())
    register_family("mine", post=r"blocks\.(?P<layer>\d+)\.ffn\.out", pre=r"blocks\.(?P<layer>\d+)\.ffn\.inp")
    assert [(one.layer, one.site, one.width) for one in find_layers(tree(module=mine()), sites=BOTH)] == [
        (0, "post", 24), (0, "pre", 24), (1, "post", 24), (1, "pre", 24)
    ]  # fmt: skip


def test_a_second_registration_replaces_the_first():
    register_family("again", post=r"blocks\.(?P<layer>\d+)\.ffn\.nowhere")
    register_family("again", post=r"towers\.(?P<layer>\d+)\.ffn\.out")
    model = tree(towers=mine().blocks)
    assert len(find_layers(model)) == 2
    register_family("again", post=r"nowhere\.(?P<layer>\d+)")
    assert find_layers(model, required=False) == []


def test_where_a_registered_family_finds_anything_the_built_in_ones_are_silent():
    dense = {"gate_proj": False, "down_proj": True}
    towers = {"vision": layers(tree(mlp=linears(12, **dense))), "text": layers(tree(mlp=linears(24, **dense)))}
    with pytest.raises(ValueError, match="both layer 0"):
        find_layers(tree(**towers))
    register_family("text tower", post=r"text\.layers\.(?P<layer>\d+)\.mlp\.down_proj")
    assert [one.name for one in find_layers(tree(**towers))] == ["text.layers.0.mlp.down_proj"]


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ({"post": r"blocks\.(?P<layer>\d+"}, "post=.*not a regular expression"),
        ({"post": r"blocks\.(\d+)\.out"}, r"post=.*\(\?P<layer>"),
        ({"post": r"b\.(?P<layer>\d+)", "pre": r"b\.(\d+)"}, r"pre=.*\(\?P<layer>"),
        ({"post": r"b\.(?P<layer>\d+)\.(?P<expert>\d+)", "pre": r"b\.(?P<layer>\d+)"}, "expert"),
    ],
)
def test_a_family_that_cannot_work_is_refused_at_the_call(patterns, words):
    with pytest.raises(ValueError, match=words):
        register_family("broken", **patterns)


def test_a_pre_site_that_does_not_fit_its_layer_is_refused():
    register_family("misfit", post=r"stacks\.(?P<layer>\d+)\.ffn\.out", pre=r"stacks\.(?P<layer>\d+)\.ffn\.inp")
    model = tree(stacks=mine().blocks)
    model.stacks[0].ffn.inp = nn.Linear(8, 36)
    with pytest.raises(ValueError, match=r"stacks.0.ffn.inp has 36 output features in a layer of width 24"):
        find_layers(model, sites=BOTH)
