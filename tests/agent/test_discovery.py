"""Which modules eigenwatch observes in which models."""

import pytest
import torch
from eigenwatch.agent import find_layers
from eigenwatch.cli.demo.decoder import Decoder, DecoderConfig
from torch import nn


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


def test_a_sharded_projection_is_refused():
    model = Decoder(DecoderConfig(layers=1))
    model.layers[0].mlp.down_proj.weight = nn.Parameter(torch.zeros(64, 128))
    with pytest.raises(ValueError, match="is sharded over ranks, which is not supported yet"):
        find_layers(model)
