"""`attach`: which layers and sites are recorded at which steps, and what is refused before the first of them."""

from pathlib import Path

import pytest
import torch
from eigenwatch import spectrum
from eigenwatch.agent import Agent, Declared, Parallelism, Schedule, Watch, attach
from eigenwatch.cli.demo.decoder import Decoder, DecoderConfig
from torch import Tensor, nn

from tests.agent.reference import Key, Reference, records

WIDTH, LAYERS, BATCH, TIME = 24, 3, 4, 16
CONFIG = DecoderConfig(model_dim=16, width=WIDTH, layers=LAYERS, heads=2, vocabulary=32)
RUN = "attached"


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG)


def batch(step: int) -> Tensor:
    return torch.randint(32, (BATCH, TIME), generator=torch.Generator().manual_seed(step))


def attached(model: nn.Module | list[nn.Module], store: Path, **options: object) -> Agent:
    return attach(model, run_id=RUN, store=store, aggregator="inline", **options)


def recorded(store: Path, steps: range, **options: object) -> set[Key]:
    """The keys that a training over `steps` leaves in the store."""
    model = decoder()
    with torch.no_grad(), attached(model, store, **options) as agent:
        for step in steps:
            model(batch(int(step)))
            agent.step(step)
    assert agent.dropped == {}
    return set(records(store, RUN))


def keys(steps: list[int], layers: tuple[int, ...] = (0, 1, 2), sites: tuple[str, ...] = ("post",)) -> set[Key]:
    return {Key(step, layer, site) for step in steps for layer in layers for site in sites}


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [([2, 0], (0, 2)), ((k for k in (1,)), (1,)), (r"layers\.([12])\.mlp\.down_proj", (1, 2))],
    ids=["indices", "any iterable", "expression"],
)
def test_layers_are_chosen(tmp_path, layers, chosen):
    assert recorded(tmp_path, range(2), every=1, layers=layers) == keys([0, 1], chosen)


def test_an_expression_may_name_experts(tmp_path):
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(9, 4) for _ in range(2)) for _ in range(2))
    reference = Reference()
    with attached(model, tmp_path, every=1, layers=r"blocks\.(\d+)\.(?P<expert>\d+)") as agent:
        for reference.step in range(2):
            for layer, expert in ((0, 0), (0, 1), (1, 1)):
                x = torch.randn(BATCH, TIME, 9)
                reference.keep(x, layer, expert=expert)
                model.blocks[layer][expert](x)
            agent.step(reference.step)
    reference.assert_stored_keys(tmp_path, RUN, [Key(s, k, "post", e) for s in (0, 1) for k in (0, 1) for e in (0, 1)])


def test_selections_have_cadences_of_their_own(tmp_path):
    """The first step is never before its start."""
    watch = [
        Watch(layers=[0], schedule=Schedule(every=2)),
        Watch(layers=[1], sites=("post", "pre"), schedule=Schedule(every=3, start=3, end=9)),
    ]
    found = recorded(tmp_path, range(14), watch=watch)
    assert found == keys(list(range(0, 14, 2)), (0,)) | keys([3, 6, 9], (1,), ("post", "pre"))
    cadences = {(key.layer, one["sampling_steps"]) for key, one in records(tmp_path, RUN).items()}
    assert cadences == {(0, 2), (1, 3)}


def test_a_rotation_takes_one_group_of_layers_after_the_other(tmp_path):
    found = recorded(tmp_path, range(13), schedule=Schedule(every=2, rotate=3))
    # The first step that is seen shows all.
    later = {2: 1, 4: 2, 6: 0, 8: 1, 10: 2, 12: 0}
    assert found == keys([0]) | {Key(step, layer) for step, layer in later.items()}
    assert {one["sampling_steps"] for one in records(tmp_path, RUN).values()} == {6}


def test_the_start_may_be_denser(tmp_path):
    found = recorded(tmp_path, range(25), schedule=Schedule(every=10, dense_start=True))
    assert found == keys([0, 1, 2, 4, 8, 10, 20])


def test_steps_that_jump_are_sampled_once_a_point_has_passed(tmp_path):
    """As where epochs of two steps are numbered 0, 1, 100, 101, 200, …"""
    assert recorded(tmp_path, [0, 1, 100, 101, 200, 201, 300, 301], every=100) == keys([0, 101, 201, 301])


def test_what_may_be_read_once_only_is_read_once(tmp_path):
    watch = (Watch(layers=[layer], schedule=Schedule(every=1)) for layer in range(2))
    declared = (Declared(layer=layer, width=8, site="pre") for layer in range(2))
    with attached((one for one in [decoder()]), tmp_path, watch=watch, declared=declared) as agent:
        assert {(one.layer, one.site) for one in agent.run.layers} == {
            (0, "post"), (1, "post"), (0, "pre"), (1, "pre"),
        }  # fmt: skip


def test_a_restart_samples_its_first_step_and_then_the_multiples(tmp_path):
    assert recorded(tmp_path, range(5003, 5013), every=5) == keys([5003, 5005, 5010])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 2, "schedule": Schedule(every=3)}, "every and schedule exclude each other"),
        ({"every": 2, "watch": [Watch()]}, "watch takes the place of every"),
        ({"layers": [0], "watch": [Watch()]}, "watch takes the place of layers"),
        ({"schedule": Schedule(), "watch": [Watch()]}, "watch takes the place of schedule"),
        ({"sites": ("pre",), "watch": [Watch()]}, "watch takes the place of sites"),
        ({"watch": []}, "watch is empty"),
        ({"every": 0}, "every must be a positive integer"),
        ({"layers": [7]}, "no layer 7, the model has 0-2"),
        ({"sites": "post"}, "sites='post' must be a sequence"),
        ({"sites": ("mid",)}, "must be a sequence of 'post', 'pre' or both"),
        ({"sites": ()}, "must be a sequence of 'post', 'pre' or both"),
        ({"watch": 3}, "watch must be a sequence, got 3"),
        ({"declared": "all"}, "declared must be a sequence, got 'all'"),
        ({"sites": None}, "must be a sequence of 'post', 'pre' or both"),
        ({"layers": []}, "must hold layer indices"),
        ({"layers": [True]}, "must hold layer indices"),
        ({"layers": 3}, "must hold layer indices"),
        ({"layers": ["0"]}, "must hold layer indices"),
        ({"layers": (one for one in (0, 9))}, "no layer 9, the model has 0-2"),
        ({"model": None}, "model is None: pass the module that is trained"),
        ({"model": []}, r"model is \[\]: pass the module"),
        ({"model": [nn.ReLU(), 3]}, "pass the module"),
        ({"limits": 5}, "limits must be OutboxLimits, got 5"),
        ({"samples": "no"}, "samples must be bool, got 'no'"),
        ({"schedule": 10}, "schedule must be a Schedule"),
        ({"watch": [Schedule()]}, "each of watch must be Watch"),
        ({"declared": [(0, 8)]}, "each of declared must be Declared"),
        ({"parallelism": 2}, "parallelism must be Parallelism or None, got 2"),
        ({"tags": "fast"}, "tags must be Mapping or None, got 'fast'"),
        ({"metrics_port": -1}, "metrics_port must be None or a port"),
        ({"aggregator": None}, "aggregator must be str, got None"),
        ({"store": 7, "aggregator": "inline"}, "store must be str or PathLike or None, got 7"),
        ({"watch": [Watch(layers=[0]), Watch(layers=[0, 1])]}, r"layer 0 \(site post\) is chosen twice"),
        ({"parallelism": Parallelism(layer_offset=[0, 3])}, "layer_offset must be .* each of 1 model chunks"),
        ({"parallelism": Parallelism(layer_offset=-1)}, "layer_offset must be a non-negative"),
        ({"run_id": "a b"}, "run"),
        ({"aggregator": "nowhere"}, "none of 'embedded', 'inline', 'auto'"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, options, words):
    with pytest.raises(ValueError, match=words) as refused:
        attach(**{"model": decoder(), "run_id": RUN, "store": tmp_path, "aggregator": "inline", **options})
    assert "\n" not in str(refused.value)
    assert list(tmp_path.rglob("*.parquet")) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"layer": -1}, "layer must be an integer, at least 0, got -1"),
        ({"width": 0}, "width must be an integer, at least 1, got 0"),
        ({"width": 8.0}, "width must be an integer"),
        ({"expert": "a"}, "expert must be an integer, at least 0, got 'a'"),
        ({"site": "mid"}, "site must be one of post, pre, got 'mid'"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Declared(**{"layer": 0, "width": 8, **wrong})


class Stage(nn.Module):
    """Some layers of a decoder, numbered from 0."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def chunks() -> list[nn.Module]:
    whole = decoder()
    return [Stage(whole.layers[:1]), Stage(whole.layers[1:])]


@pytest.mark.parametrize(("layers", "chosen"), [(None, (4, 7, 8)), ([4, 8], (4, 8)), ([8], (8,))])
def test_the_chunks_of_a_pipeline_keep_their_global_layers(tmp_path, layers, chosen):
    models, reference = chunks(), Reference()
    for model, offset in zip(models, (4, 7), strict=True):
        reference.hook(model, offset=offset)
    parallelism = Parallelism(layer_offset=[4, 7])
    with attached(models, tmp_path, every=1, layers=layers, parallelism=parallelism) as agent:
        for reference.step in range(2):
            x = torch.randn(BATCH, TIME, 16)
            for model in models:
                x = model(x)
            agent.step(reference.step)
    wanted = [Key(step, layer) for step in range(2) for layer in chosen]
    reference.assert_stored_keys(tmp_path, RUN, wanted)


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ([0], "layer 0 .*chosen twice.*layer_offset"),
        ([0, 0], "layer 0 .*chosen twice.*layer_offset"),
        ([1], "each of 2 model chunks"),
        ([0, 1, 2], "each of 2 model chunks"),
        ([0, -1], "non-negative"),
    ],
)
def test_offsets_that_do_not_fit_the_chunks_are_refused(tmp_path, offsets, words):
    with pytest.raises(ValueError, match=words):
        attached(chunks(), tmp_path, parallelism=Parallelism(layer_offset=offsets))


def test_layers_that_no_chunk_has_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no rank has layer 5"):
        attached(chunks(), tmp_path, layers=[4, 5], parallelism=Parallelism(layer_offset=[4, 7]))


def test_a_wrong_step_never_raises_and_warns_once(tmp_path, caplog):
    model = decoder()
    with attached(model, tmp_path, every=1) as agent:
        for step in (0, 1, "two", None, 3.5, -1, 2, 1, 0, 3):
            model(batch(0))
            agent.step(step)
    assert caplog.text.count("was ignored") == 1
    assert caplog.text.count("came after step") == 1
    found = records(tmp_path, RUN)
    assert set(found) == keys([0, 1, 2, 3])
    assert {one["tokens"] for one in found.values()} == {BATCH * TIME}  # of its own step alone


def test_numbers_of_other_kinds_are_steps(tmp_path):
    assert recorded(tmp_path, torch.arange(2), every=1) == keys([0, 1])


def test_evaluation_within_a_sampled_step_does_not_count(tmp_path):
    model = decoder()
    reference = Reference().hook(model)
    with attached(model, tmp_path, every=2) as agent:
        for reference.step in range(4):
            model(batch(reference.step))
            model.eval()
            model(batch(99))
            model.train()
            model(batch(100 + reference.step))
            agent.step(reference.step)
    for row in reference.assert_stored(tmp_path, RUN, [0, 2]).values():
        assert row["tokens"] == 2 * BATCH * TIME


@pytest.mark.parametrize(
    ("allowed", "size", "form"), [(True, 1, "samples"), (False, 1, "scatter"), (True, 4, "scatter")]
)
def test_rows_leave_the_process_where_they_are_fewer_bytes_unless_that_is_forbidden(tmp_path, allowed, size, form):
    model = Decoder(DecoderConfig(model_dim=16, width=64, layers=1, heads=2, vocabulary=32))
    reference = Reference().hook(model)
    with attached(model, tmp_path, every=1, samples=allowed) as agent:
        model(batch(0).repeat(size, 1))
        agent.step(0)
    (row,) = reference.assert_stored(tmp_path, RUN, [0]).values()
    assert row["form"] == form


def test_both_sites_give_their_divergence(tmp_path):
    model = decoder()
    reference = Reference().hook(model, ("post", "pre"))
    with attached(model, tmp_path, every=2, sites=("pre", "post")) as agent:
        for reference.step in range(3):
            model(batch(reference.step))
            agent.step(reference.step)
    found = reference.assert_stored(tmp_path, RUN, [0, 2])
    for key, row in found.items():
        pre, post = (torch.tensor(found[key._replace(site=site)]["eigenvalues"]).double() for site in ("pre", "post"))
        assert row["js_divergence"] == pytest.approx(spectrum.js_divergence(pre, post).item(), rel=1e-6, abs=1e-9)


def test_records_carry_what_sampling_costs(tmp_path):
    model = decoder()
    with attached(model, tmp_path, every=2) as agent:
        assert agent.overhead_ratio is None
        for step in range(12):
            model(batch(step))
            agent.step(step)
        assert agent.overhead_ratio > 0
    found = records(tmp_path, RUN)
    assert {one["sampling_steps"] for one in found.values()} == {2}
    assert found[Key(0, 0)]["overhead_ratio"] is None
    assert found[Key(10, 0)]["overhead_ratio"] > 0


def test_an_agent_says_what_it_observes(tmp_path):
    watch = [Watch(layers=[0, 1], schedule=Schedule(every=10)), Watch(layers=[2], schedule=Schedule(every=5, rotate=4))]
    with attached(decoder(), tmp_path, watch=watch) as agent:
        assert str(agent) == (
            "eigenwatch: run attached, 3 layers (layers.N.mlp.down_proj), D = 24, site post, "
            "every 10 or 20 steps, 1 rank"
        )


class Shrinking(nn.Module):
    """Its second layer's width changes in mid-training, as no hook could foresee."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.ModuleDict({"down_proj": nn.Linear(WIDTH, WIDTH)})}) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["mlp"]["down_proj"](x[..., : layer["mlp"]["down_proj"].weight.shape[1]])
        return x


def test_a_layer_whose_width_changes_is_counted_and_switched_off_and_the_training_does_not_notice(tmp_path, caplog):
    def train(model: Shrinking, step: int) -> str:
        if step == 2:
            model.layers[1]["mlp"]["down_proj"].weight = nn.Parameter(torch.ones(WIDTH, WIDTH // 2))
        draws = torch.Generator().manual_seed(step)
        loss = model(torch.randn(BATCH, TIME, WIDTH, generator=draws)).square().mean()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
        return loss.item().hex()

    alone, observed = Shrinking(), Shrinking()
    losses = [train(alone, step) for step in range(8)]
    reference = Reference().hook(observed)
    with attached(observed, tmp_path, every=1) as agent:
        for reference.step in range(8):
            assert train(observed, reference.step) == losses[reference.step]
            agent.step(reference.step)
    wanted = [Key(step, 0) for step in range(8)] + [Key(step, 1) for step in range(2)]
    reference.assert_stored_keys(tmp_path, RUN, wanted)
    assert agent.dropped == {"observation_error": 3}
    assert agent.close() == 3
    assert "layer 1 (layers.1.mlp.down_proj) was not observed: input has width 12, expected 24" in caplog.text
    assert "no longer observed after 3 errors" in caplog.text
