"""Which modules eigenwatch observes in which models."""

import pytest
import torch
import torch.distributed as dist
from eigenwatch.agent import find_layers
from eigenwatch.cli.demo.decoder import Decoder, DecoderConfig
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore


def demo() -> nn.Module:
    return Decoder(DecoderConfig(model_dim=16, width=40, layers=3, heads=2))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_inner=40, n_layer=3, n_head=2))


def neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=32, hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2
        )
    )  # fmt: skip


def mlp(width: int) -> nn.Module:
    block = nn.Module()
    block.mlp = nn.Module()
    block.mlp.up_proj, block.mlp.down_proj = nn.Linear(8, width), nn.Linear(width, 8)
    return block


def decoder(*widths: int) -> nn.Module:
    """A tree of modules like a decoder's, one layer for each width."""
    model = nn.Module()
    model.layers = nn.ModuleList(mlp(width) for width in widths)
    return model


class Wrapper(nn.Module):
    """What DDP does to module paths."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (demo, "layers.{}.mlp.down_proj"),
        (llama, "model.layers.{}.mlp.down_proj"),
        (gpt2, "transformer.h.{}.mlp.c_proj"),
        (neox, "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    ],
)
def test_the_down_projections_of_a_decoder_are_found(build, name):
    model = build()
    found = find_layers(model)
    assert [(one.layer, one.name, one.width) for one in found] == [
        (index, name.format(index), 40) for index in range(3)
    ]
    for one in found:
        assert one.module is model.get_submodule(one.name)


@pytest.mark.parametrize(
    "wrap", [Wrapper, lambda model: Wrapper(Wrapper(model)), torch.compile, lambda model: Wrapper(torch.compile(model))]
)
def test_wrappers_change_neither_what_is_found_nor_its_name(wrap):
    model = demo()
    assert find_layers(wrap(model)) == find_layers(model)


def test_layers_come_in_the_order_of_their_numbers():
    assert [one.layer for one in find_layers(decoder(*[16] * 12))] == list(range(12))


def test_layers_may_differ_in_width():
    assert [one.width for one in find_layers(decoder(16, 24, 32))] == [16, 24, 32]


def test_the_stage_of_a_pipeline_keeps_the_numbers_of_its_layers():
    model = nn.Module()
    model.layers = nn.ModuleDict({"10": mlp(16), "9": mlp(16)})
    assert [one.layer for one in find_layers(model)] == [9, 10]


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        (r"encoder\.(\d+)\.2", [0, 1]),
        (r"encoder\.(?P<layer>\d+)\.(2)", [0, 1]),
        (r"(encoder)?.*\.(?P<layer>\d+)\.2", [0, 1]),
        (r"encoder\.1\.2", [0]),
        (r"encoder\.\d\.2", [0, 1]),
        (r".*\.2", [0, 1]),
    ],
)
def test_other_models_are_named_by_a_regular_expression(pattern, layers):
    model = nn.Module()
    model.encoder = nn.ModuleList(nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4)) for _ in range(2))
    found = find_layers(model, pattern)
    assert [one.layer for one in found] == layers
    assert all(one.name.endswith(".2") and one.width == 9 for one in found)


def test_a_regular_expression_matches_whole_paths():
    with pytest.raises(ValueError, match="no layer matches"):
        find_layers(decoder(16), r"layers\.(\d+)\.mlp\.down")


def test_where_nothing_is_found_the_candidates_are_listed():
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.ModuleDict({"wide": nn.Linear(4, 9), "narrow": nn.Linear(9, 4)}) for _ in range(12))
    with pytest.raises(ValueError, match="layers=") as refused:
        find_layers(model)
    assert str(refused.value).endswith("candidates: blocks.N.narrow")
    assert "LLaMA" in str(refused.value)
    with pytest.raises(ValueError, match="none"):
        find_layers(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (r"layers\.(\d+", "not a regular expression"),
        (r"layers\.(\d+)\.mlp\.(?:up|down)_proj", "both layer 0"),
        (r"layers\.(\d+)\.mlp", "not a projection"),
        (r"(layers)\.\d+\.mlp\.down_proj", "capture digits"),
        (r"heads\.(\d+)", "no layer matches"),
    ],
)
def test_an_expression_that_cannot_work_is_refused_in_one_line_that_names_it(pattern, words):
    with pytest.raises(ValueError, match=words) as refused:
        find_layers(decoder(16, 16), pattern)
    assert "\n" not in str(refused.value)


def test_an_encoder_and_a_decoder_do_not_share_a_layer():
    model = nn.Module()
    model.encoder, model.decoder = decoder(16), decoder(16)
    with pytest.raises(ValueError, match=r"encoder.*decoder.*both layer 0.*layers="):
        find_layers(model)


def test_wrappers_inside_the_path_hide_nothing():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Decoder(DecoderConfig(layers=3))
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    model.layers[1] = torch.compile(model.layers[1])
    model.layers[2].mlp.down_proj = checkpoint_wrapper(model.layers[2].mlp.down_proj)
    assert [one.name for one in find_layers(model)] == [f"layers.{k}.mlp.down_proj" for k in range(3)]
    assert all(isinstance(one.module, nn.Linear) for one in find_layers(model))


@pytest.fixture
def two_ranks():
    """Rank 0 of two, whose partner never has to answer."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_sharded_projections_are_found_with_the_width_of_the_whole_layer(two_ranks):
    tensor_parallel = parallelize_module(
        decoder(16), two_ranks, {"layers.0.mlp.up_proj": ColwiseParallel(), "layers.0.mlp.down_proj": RowwiseParallel()}
    )
    fully_sharded = decoder(16)
    fully_shard(fully_sharded, mesh=two_ranks)
    for model in (tensor_parallel, fully_sharded):
        weight = model.layers[0].mlp.down_proj.weight
        assert weight.to_local().numel() == 16 * 8 / 2
        assert [one.width for one in find_layers(model)] == [16]


@pytest.mark.parametrize("build", [llama, gpt2])
def test_projections_with_empty_weights_are_found_with_the_width_of_the_whole_layer(build):
    model = build()
    for parameter in model.parameters():  # what ZeRO-3 leaves between uses
        parameter.data = torch.empty(0)
    assert [(one.site, one.width) for one in find_layers(model, sites=("post", "pre"))] == [
        ("post", 40), ("pre", 40)
    ] * 3  # fmt: skip


def test_older_conv1d_modules_know_their_width_from_the_weight_alone():
    model = gpt2()
    for one in find_layers(model):
        del one.module.nx
    assert [one.width for one in find_layers(model)] == [40] * 3


def test_indices_choose_layers_in_any_iterable():
    model = decoder(16, 24, 32)
    assert [one.layer for one in find_layers(model, [2, 0])] == [0, 2]
    assert [one.width for one in find_layers(model, (k for k in (1,)))] == [24]


@pytest.mark.parametrize(
    ("layers", "words"),
    [([1, 7], "no layer 7, the model has 0-2"), ([-1], "from 0"), ([], "indices"), (["0"], "int"), ([True], "int")],
)
def test_indices_that_cannot_be_layers_are_refused(layers, words):
    with pytest.raises(ValueError, match=words):
        find_layers(decoder(16, 24, 32), layers)


def test_a_stage_of_a_pipeline_may_hold_none_of_the_layers():
    assert find_layers(nn.Linear(4, 4), required=False) == []
    assert find_layers(nn.Linear(4, 4), r"layers\.(\d+)", required=False) == []
    assert [one.layer for one in find_layers(decoder(16), [0, 7], required=False)] == [0]


def test_an_expression_may_name_experts():
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(9, 4) for _ in range(2)) for _ in range(2))
    for pattern in (r"blocks\.(\d+)\.(?P<expert>\d+)", r"blocks\.(?P<layer>\d+)\.(?P<expert>\d+)"):
        found = find_layers(model, pattern)
        assert [(one.layer, one.expert) for one in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("sites", [(), "pre", ("mid",)])
def test_sites_that_do_not_exist_are_refused(sites):
    with pytest.raises(ValueError, match="'post', 'pre' or both"):
        find_layers(decoder(16), sites=sites)


def test_a_layer_without_a_known_pre_site_is_refused_and_not_skipped():
    with pytest.raises(ValueError, match=r"beside layers.0.mlp.down_proj.*register_family"):
        find_layers(decoder(16), sites=("post", "pre"))
    with pytest.raises(ValueError, match="register_family"):
        find_layers(decoder(16), r"layers\.(\d+)\.mlp\.down_proj", sites=("post", "pre"))
