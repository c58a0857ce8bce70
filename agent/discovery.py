"""Finding the down-projections of a decoder: the modules whose input is the post-activation.

Families are told apart by module paths, since those survive wrappers (DDP, compile) that hide classes. Whoever has
another model names its layers with a regular expression.
"""

import re
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

FAMILIES = {
    "LLaMA": r"layers\.(?P<layer>\d+)\.mlp\.down_proj",
    "GPT-2": r"h\.(?P<layer>\d+)\.mlp\.c_proj",
    "GPT-NeoX": r"layers\.(?P<layer>\d+)\.mlp\.dense_4h_to_h",
}
"""Module path of the down-projection by model family; wrappers may stand in front."""


_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""Path elements of DDP, compile, activation checkpointing and FSDP, which hide the model's own names."""


class FoundLayer(NamedTuple):
    """One down-projection."""

    layer: int
    """Global decoder-layer index."""
    name: str
    """Module path, without the prefixes of wrappers."""
    module: nn.Module
    width: int
    """D, the projection's input features."""


def find_layers(model: nn.Module, pattern: str | None = None) -> list[FoundLayer]:
    """The down-projections of `model`, ordered by layer.

    Args:
        model: any module tree.
        pattern: regular expression that must match a whole module path; its group `layer` (or first group) is the
            layer index, and without a group the matches are numbered in the model's order. Default: the path of
            each family in `FAMILIES`.

    Raises:
        ValueError: nothing was found (the message lists candidates), the pattern is not a regular expression, two
            modules claim the same layer, or a match is not a projection.
    """
    if pattern is None:
        matches = _matches(model, r"(?:.*\.)?(?:" + "|".join(_anonymous(p) for p in FAMILIES.values()) + ")")
    else:
        matches = _matches(model, pattern)
    if not matches:
        what = "no layer matches " + repr(pattern) if pattern else f"no {', '.join(FAMILIES)} layer found"
        raise ValueError(
            f"{what}: pass layers=r'…(\\d+)…' matching the down-projections; candidates: {_candidates(model)}"
        )
    found = [FoundLayer(layer, name, module, _width(name, module)) for layer, name, module in matches]
    found.sort(key=lambda one: one.layer)
    for before, after in pairwise(found):
        if before.layer == after.layer:
            raise ValueError(
                f"{before.name} and {after.name} are both layer {before.layer}: narrow layers= to one of them"
            )
    return found


def _anonymous(pattern: str) -> str:
    return pattern.replace("(?P<layer>", "(")


def _matches(model: nn.Module, pattern: str) -> list[tuple[int, str, nn.Module]]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"layers={pattern!r} is not a regular expression: {error}") from None
    matches: dict[str, tuple[int, str, nn.Module]] = {}
    for path, module in model.named_modules():
        name = _WRAPPERS.sub("", f"{path}.").removesuffix(".")
        match = compiled.fullmatch(name)
        if match is None:
            continue
        groups = match.groupdict()
        index = groups.get("layer") or next((group for group in match.groups() if group is not None), None)
        if index is not None and not index.isdigit():
            raise ValueError(f"layers={pattern!r} takes {index!r} of {name} as the layer index: capture digits")
        position = list(matches).index(name) if name in matches else len(matches)
        # A wrapper and what it wraps have one name: the inner one comes later and stays.
        matches[name] = (position if index is None else int(index), name, module)
    return list(matches.values())


def _width(name: str, module: nn.Module) -> int:
    features = getattr(module, "in_features", None)
    weight = getattr(module, "weight", None)
    if isinstance(features, int):
        stored = weight.shape[1] if isinstance(weight, torch.Tensor) and weight.ndim == 2 else features
        if hasattr(weight, "device_mesh") or stored != features:
            raise ValueError(
                f"{name} is sharded over ranks, which is not supported yet: the spectrum of a shard is not the layer's"
            )
        return features
    if type(module).__name__ == "Conv1D" and weight is not None:  # Hugging Face GPT-2 stores (in, out)
        return int(weight.shape[0])
    raise ValueError(f"{name} is a {type(module).__name__}, not a projection: name a Linear or Conv1D module")


def _candidates(model: nn.Module, most: int = 8) -> str:
    """Projections that narrow, as a down-projection does, with digits abstracted."""
    seen: dict[str, None] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.in_features > module.out_features:
            seen[re.sub(r"\d+", "N", name)] = None
    names = list(seen)
    return (", ".join(names[:most]) + (" …" if len(names) > most else "")) or "none (no narrowing Linear in the model)"
