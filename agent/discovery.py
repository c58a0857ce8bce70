"""Finding what to observe in a decoder: the projections around the activation of each feed-forward layer.

`attach` calls it once, on every rank, before the first step. Nothing is passed over in silence: what cannot be
observed (experts fused into one parameter, a layer without the wanted site) is refused with the remedy.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Literal, NamedTuple

from torch import nn

from .families import Family, family_tiers, gate_columns, input_width

_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""Path elements of DDP, compile, activation checkpointing and FSDP, which hide the model's own names."""

_DECODER_LAYER = re.compile(r"(?:.*\.)?(?<!mtp\.)(?:layers|h|blocks)\.(?P<layer>\d+)\.")
"""What lies inside a decoder layer; Megatron's multi-token prediction (`mtp`) has layers of its own numbering."""

_EXPERTS = re.compile(r"(?:.*\.)?(?!shared)\w*experts")
"""Containers of routed experts: `experts`, torchtitan's `routed_experts`."""

_FUSED_DOWN = re.compile(r"(?:down_proj|w2)(?:_\w+)?")
"""3-D parameters that are the down-projections of many experts; torchtitan appends the dimensions (`w2_EDF`)."""

_Key = tuple[int, int | None]
"""(layer, expert)"""
_Modules = dict[str, nn.Module]
"""By path without wrapper elements; a wrapper and what it wraps have one path, and the wrapped module stands there."""


class FoundLayer(NamedTuple):
    """One site of a feed-forward layer, or of one expert of it."""

    layer: int
    """Global decoder-layer index: as the module path says, or Megatron's `layer_number`, since its paths count from 0
    on each pipeline stage."""
    name: str
    """Module path, without the elements of wrappers."""
    module: nn.Module
    """The module to hook."""
    width: int
    """D of the whole layer, even where this rank holds a shard of it."""
    site: str = "post"
    """"post": observe the module's input. "pre": observe its output, up to a constant: Megatron's projections return
    (output, bias), the bias not added, which shifts the mean and leaves the covariance as it is."""
    expert: int | None = None
    """Global expert index; None for a dense layer, and for the shared expert of a mixture, which sees every token."""
    columns: tuple[int, int] | None = None
    """Which columns of the module's output, as it leaves the module on this rank, are the pre-activation, where gate
    and up are one projection; None: all."""


def find_layers(
    model: nn.Module,
    layers: str | Iterable[int] | None = None,
    sites: Sequence[str] = ("post",),
    required: bool = True,
    *,
    fused: Literal["refuse", "skip"] = "refuse",
) -> list[FoundLayer]:
    """What to observe in `model`, ordered by layer, expert (the dense part first) and site (`post` before `pre`).

    Weights may be sharded (tensor parallel, FSDP) or empty (ZeRO-3): `width` is the whole layer's.

    Args:
        model: any module tree.
        layers: None: all layers of the known families (`register_family` adds to them). Indices: those layers only. A
            regular expression: it must match a whole module path of a down-projection; its group `layer` (or first
            group) is the layer index, its group `expert` the expert's, and without a group the matches are numbered
            in the model's order. Such a choice is taken as it is: neither `pre` nor fused experts are looked for.
        sites: of "post" and "pre".
        required: whether it is an error to find nothing, or not an index of `layers`; false for the stage of a
            pipeline, where the layers may be elsewhere.
        fused: what to do about experts without modules of their own: refuse, or skip them because the caller
            observes them by hand.

    Raises:
        ValueError: nothing was found (the message lists candidates), `layers` is not an expression or names a layer
            that does not exist, two modules claim the same site, a layer has no `pre`, a match is not a projection,
            or a chosen layer holds fused experts.
    """
    if not sites or not set(sites) <= {"post", "pre"}:
        raise ValueError(f"sites={sites!r} must name 'post', 'pre' or both")
    modules = _modules(model)
    if isinstance(layers, str):
        if "pre" in sites:
            raise ValueError(
                f"layers={layers!r} names down-projections only: for 'pre' use register_family(name, post=…, pre=…)"
            )
        posts = _claims(modules, [_expression(layers)])
        if not posts and required:
            raise _nothing(model, f"no layer matches {layers!r}")
        return _found(modules, posts, {}, sites)

    wanted = None if layers is None else _indices(layers)
    posts, pres = _claims_of_families(modules, sites)
    experts = _fused_experts(modules, posts.values())
    existing = {layer for layer, _ in posts} | set(experts.values())
    if not existing and required:
        raise _nothing(model, f"no {', '.join(one.name for tier in family_tiers() for one in tier)} layer found")
    if wanted is not None:
        missing = sorted(wanted - existing)
        if missing and required:
            raise ValueError(f"layers={sorted(wanted)}: no layer {_listed(missing)}, the model has {_listed(existing)}")
        posts = {key: name for key, name in posts.items() if key[0] in wanted}
        experts = {name: layer for name, layer in experts.items() if layer in wanted}
    if experts and fused == "refuse":
        raise _cannot_hook(experts, {layer for layer, _ in posts} - set(experts.values()))
    return _found(modules, posts, pres, sites)


def _modules(model: nn.Module) -> _Modules:
    # The wrapped module comes after its wrapper and stays.
    return {_WRAPPERS.sub("", f"{path}.").removesuffix("."): module for path, module in model.named_modules()}


def _expression(layers: str) -> re.Pattern[str]:
    try:
        return re.compile(layers)
    except re.error as error:
        raise ValueError(f"layers={layers!r} is not a regular expression: {error}") from None


def _indices(layers: Iterable[int]) -> set[int]:
    indices = list(layers)
    if not indices or not all(type(one) is int and one >= 0 for one in indices):
        raise ValueError(f"layers={indices!r} must hold layer indices (int, from 0), or be a regular expression")
    return set(indices)


def _claims_of_families(modules: _Modules, sites: Sequence[str]) -> tuple[dict[_Key, str], dict[_Key, str]]:
    """Module paths of the `post` sites and, if wanted, the `pre` sites, by the first tier of families that has any."""
    tier: Sequence[Family]
    for tier in family_tiers():
        posts = _claims(modules, [one.post for one in tier])
        if posts:
            pres = [one.pre for one in tier if one.pre is not None and "pre" in sites]
            return posts, _claims(modules, pres)
    return {}, {}


def _claims(modules: _Modules, patterns: Sequence[re.Pattern[str]]) -> dict[_Key, str]:
    claims: dict[_Key, str] = {}
    for name in modules:
        match = next(filter(None, (one.fullmatch(name) for one in patterns)), None)
        if match is None:
            continue
        key = _key(modules, name, match, len(claims))
        if key in claims:
            layer, expert = key
            both = f"layer {layer}" if expert is None else f"layer {layer}, expert {expert}"
            raise ValueError(
                f"{claims[key]} and {name} are both {both}: narrow layers= to one of them by a regular expression"
            )
        claims[key] = name
    return claims


def _key(modules: _Modules, name: str, match: re.Match[str], position: int) -> _Key:
    """Layer and expert of a match, both global."""
    groups = match.groupdict()
    unnamed = (text for k, text in enumerate(match.groups(), 1) if k != match.re.groupindex.get("expert"))
    index = groups.get("layer") or next(filter(None, unnamed), None)
    expert = groups.get("expert")
    for text in (index, expert):
        if text is not None and not text.isdigit():
            raise ValueError(f"{match.re.pattern!r} takes {text!r} of {name} as an index: capture digits")
    layer = position if index is None else _global_layer(modules, name, int(index))
    return layer, None if expert is None else _global_expert(modules, name[: match.start("expert")], int(expert))


def _global_layer(modules: _Modules, name: str, index: int) -> int:
    before, element, _ = name.rpartition(f"decoder.layers.{index}.")
    layer = modules.get(f"{before}{element}".removesuffix(".")) if element else None
    number = getattr(layer, "layer_number", None)  # Megatron's, from 1
    return number - 1 if isinstance(number, int) else index


def _global_expert(modules: _Modules, container: str, index: int) -> int:
    mixture = modules.get(container.removesuffix(".experts.local_experts."))
    indices = getattr(mixture, "local_expert_indices", None)  # Megatron's expert parallelism counts from 0 on each rank
    return index if indices is None else int(indices[index])


def _fused_experts(modules: _Modules, claimed: Collection[str]) -> dict[str, int]:
    """Outermost modules inside decoder layers that hold experts which nothing in `claimed` belongs to; their layer."""
    fused: dict[str, int] = {}
    for name, module in modules.items():
        inside = _DECODER_LAYER.match(name)
        if inside is None or any(name.startswith(f"{outer}.") for outer in fused):
            continue
        if _EXPERTS.fullmatch(name):
            unseen = not any(one.startswith(f"{name}.") for one in claimed)
            holds = unseen and next(module.parameters(), None) is not None
        else:
            own = module.named_parameters(recurse=False)
            holds = any(_FUSED_DOWN.fullmatch(parameter) and weight.ndim == 3 for parameter, weight in own)
        if holds:
            fused[name] = _global_layer(modules, name, int(inside["layer"]))
    return fused


def _found(modules: _Modules, posts: dict[_Key, str], pres: dict[_Key, str], sites: Sequence[str]) -> list[FoundLayer]:
    found = []
    for key in sorted(posts, key=lambda key: (key[0], -1 if key[1] is None else key[1])):
        (layer, expert), name = key, posts[key]
        width = input_width(name, modules[name])
        if "post" in sites:
            found.append(FoundLayer(layer, name, modules[name], width, "post", expert))
        if "pre" in sites:
            if key not in pres:
                raise ValueError(
                    f"no gate or up projection is known beside {name}: name it with register_family(name, post=…, "
                    "pre=…), or leave 'pre' out of sites"
                )
            up = modules[pres[key]]
            found.append(FoundLayer(layer, pres[key], up, width, "pre", expert, gate_columns(pres[key], up, width)))
    return found


def _cannot_hook(experts: dict[str, int], dense: set[int]) -> ValueError:
    paths = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in experts)
    instead = f", or choose the dense layers with layers={sorted(dense)}" if dense else ""
    return ValueError(
        f"{', '.join(paths)} (layer {_listed(experts.values())}): fused experts, no module sees one expert's "
        "activations. Declare them and call agent.observe(x, layer=, site=, expert=) in their forward" + instead
    )


def _listed(layers: Iterable[int]) -> str:
    """1, 2, 3, 7 as 1-3, 7."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _nothing(model: nn.Module, what: str) -> ValueError:
    return ValueError(
        f"{what}: pass layers=r'…(\\d+)…' matching the down-projections, or name them once with register_family(name, "
        f"post=r'…(?P<layer>\\d+)…'); candidates: {_candidates(model)}"
    )


def _candidates(model: nn.Module, most: int = 8) -> str:
    """Projections that narrow, as a down-projection does, with digits abstracted."""
    seen: dict[str, None] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.in_features > module.out_features:
            seen[re.sub(r"\d+", "N", name)] = None
    names = list(seen)
    return (", ".join(names[:most]) + (" …" if len(names) > most else "")) or "none (no narrowing Linear in the model)"
