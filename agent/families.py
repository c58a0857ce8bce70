"""Model families: the module paths under which decoders keep the projections of their feed-forward layers.

A family is two regular expressions on module paths, since paths survive the wrappers (DDP, FSDP, compile) that hide
classes. The names were read in the sources of Hugging Face transformers, torchtitan and Megatron core.
`register_family` adds one's own: call it once, before `attach`, on the thread that attaches.
"""

import re
from typing import Any, NamedTuple


class Family(NamedTuple):
    """Where the down-projections are, and the projections whose outputs are the pre-activations."""

    name: str
    post: re.Pattern[str]
    """Paths of the down-projections: group `layer`, and group `expert` where each expert has modules of its own."""
    pre: re.Pattern[str] | None
    """Paths of the gate projections of gated feed-forwards, else of the up projections; the same groups."""


def register_family(name: str, *, post: str, pre: str | None = None) -> None:
    r"""Teaches `find_layers`, and so `attach`, the module names of another model.

    The expressions match the end of a module path, from an element's beginning, so that wrappers may stand in front.
    A model in which a registered family finds anything is left to the registered families alone: that is also how to
    keep a vision or encoder tower with familiar names out. A second registration of a name replaces the first.

    Args:
        name: for messages.
        post: the down-projections; its group `layer` is the layer's index, its group `expert`, if any, the expert's.
        pre: the gate projections where the feed-forward is gated, else the up projections, with the same groups. A
            projection twice as wide as `post` is taken for gate and up in one, the gate in the first half. None: the
            site `pre` is refused for this family.

    Raises:
        ValueError: an expression does not compile or lacks a group.

    Example:
        >>> register_family("mine", post=r"blocks\.(?P<layer>\d+)\.ffn\.out", pre=r"blocks\.(?P<layer>\d+)\.ffn\.inp")
    """
    _registered[name] = _family(name, post, pre)


def family_tiers() -> tuple[tuple[Family, ...], tuple[Family, ...]]:
    """The registered families and the built-in ones; the second count only where the first find nothing."""
    return tuple(_registered.values()), BUILT_IN


def input_width(name: str, module: Any) -> int:
    """Whole input width of the down-projection `name`, however this rank holds it: sharded, or empty under ZeRO-3."""
    if hasattr(module, "input_size_per_partition"):  # Megatron's RowParallelLinear
        return int(module.input_size)
    if hasattr(module, "in_features"):
        # Megatron with Transformer Engine: in_features may be a shard's, the configuration is not.
        whole = getattr(getattr(module, "config", None), "ffn_hidden_size", module.in_features)
        return int(whole)
    if type(module).__name__ == "Conv1D":  # Hugging Face GPT-2 stores (in, out); older releases have no nx
        return int(module.nx if hasattr(module, "nx") else module.weight.shape[0])
    raise ValueError(f"{name} is a {type(module).__name__}, not a projection: name a Linear or Conv1D module")


def gate_columns(name: str, module: Any, width: int) -> tuple[int, int] | None:
    """Columns of this rank's output of `name` that are the pre-activation of a layer of `width`; None: all."""
    outputs = next((getattr(module, one) for one in _OUTPUTS if hasattr(module, one)), None)
    gated = getattr(getattr(module, "config", None), "gated_linear_unit", None)  # Megatron, whose outputs are a shard's
    if outputs is None or (gated is None and outputs not in (width, 2 * width)):
        raise ValueError(
            f"{name} has {outputs} output features in a layer of width {width}: name the gate projection, or the up "
            "projection of a feed-forward without gate, with register_family"
        )
    return (0, outputs // 2) if (outputs == 2 * width if gated is None else gated) else None


_OUTPUTS = ("output_size_per_partition", "out_features", "nf")
"""Attributes that hold the width of a projection's output on this rank: Megatron, Linear, Conv1D."""


def _family(name: str, post: str, pre: str | None) -> Family:
    first = _compiled("post", post)
    second = None if pre is None else _compiled("pre", pre)
    if second is not None and ("expert" in first.groupindex) != ("expert" in second.groupindex):
        raise ValueError(f"family {name!r}: post and pre must both have a group (?P<expert>…) or neither")
    return Family(name, first, second)


def _compiled(site: str, pattern: str) -> re.Pattern[str]:
    try:
        if "layer" not in re.compile(pattern).groupindex:
            raise ValueError(f"{site}={pattern!r} needs a group for the layer's index, such as (?P<layer>\\d+)")
        return re.compile(rf"(?:.*\.)?(?:{pattern})")
    except re.error as error:
        raise ValueError(f"{site}={pattern!r} is not a regular expression: {error}") from None


_registered: dict[str, Family] = {}

_ROUTED_OR_SHARED = r"(?:experts\.(?P<expert>\d+)\.|shared_experts?\.)?"
"""A shared expert sees every token, as a dense feed-forward does: it is the dense part of its layer, expert None."""

BUILT_IN = (
    # Mistral, Qwen, Gemma and DeepSeek have LLaMA's names; Phi-3 and GLM fuse gate and up.
    _family(
        "LLaMA",
        rf"layers\.(?P<layer>\d+)\.mlp\.{_ROUTED_OR_SHARED}down_proj",
        rf"layers\.(?P<layer>\d+)\.mlp\.{_ROUTED_OR_SHARED}gate(?:_up)?_proj",
    ),
    # transformers before 5; since then Mixtral's experts are fused.
    _family(
        "Mixtral",
        r"layers\.(?P<layer>\d+)\.block_sparse_moe\.experts\.(?P<expert>\d+)\.w2",
        r"layers\.(?P<layer>\d+)\.block_sparse_moe\.experts\.(?P<expert>\d+)\.w1",
    ),
    _family("Phi", r"layers\.(?P<layer>\d+)\.mlp\.fc2", r"layers\.(?P<layer>\d+)\.mlp\.fc1"),
    _family("OPT", r"decoder\.layers\.(?P<layer>\d+)\.fc2", r"decoder\.layers\.(?P<layer>\d+)\.fc1"),
    _family("GPT-2", r"h\.(?P<layer>\d+)\.mlp\.c_proj", r"h\.(?P<layer>\d+)\.mlp\.c_fc"),
    _family("GPT-NeoX", r"layers\.(?P<layer>\d+)\.mlp\.dense_4h_to_h", r"layers\.(?P<layer>\d+)\.mlp\.dense_h_to_4h"),
    # Its routed experts are fused. Some revisions fuse gate and up too, with alternating columns (w13): no `pre` there.
    _family(
        "torchtitan",
        r"layers\.(?P<layer>\d+)\.(?:feed_forward|moe\.shared_experts)\.w2",
        r"layers\.(?P<layer>\d+)\.(?:feed_forward|moe\.shared_experts)\.w1",
    ),
    _family(
        "Megatron",
        r"decoder\.layers\.(?P<layer>\d+)\.mlp\.(?:experts\.local_experts\.(?P<expert>\d+)\.|shared_experts\.)?linear_fc2",
        r"decoder\.layers\.(?P<layer>\d+)\.mlp\.(?:experts\.local_experts\.(?P<expert>\d+)\.|shared_experts\.)?linear_fc1",
    ),
)
