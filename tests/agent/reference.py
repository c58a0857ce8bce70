"""What the store must hold: the activations that hooks of the test's own kept, and their covariance in float64."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from eigenwatch import spectrum
from eigenwatch.agent import find_layers
from eigenwatch.history import open_history
from torch import Tensor, nn


class Key(NamedTuple):
    """Of a record."""

    step: int
    layer: int
    site: str = "post"
    expert: int | None = None


class Reference:
    """Keeps what the places of a model were really given, under the step that the test says it is in."""

    def __init__(self) -> None:
        self.step = 0
        self.rows: dict[Key, list[Tensor]] = defaultdict(list)
        """(N, D) of every forward."""
        self.counted: Tensor | None = None
        """Which tokens are no padding, in the order of the rows; None: all."""

    def keep(self, x: Tensor, layer: int, site: str = "post", expert: int | None = None) -> None:
        rows_ND = x.detach().flatten(0, -2)
        if self.counted is not None:
            rows_ND = rows_ND[self.counted.flatten().bool()]
        self.rows[Key(self.step, layer, site, expert)].append(rows_ND.clone())

    def hook(self, model: nn.Module, sites: Iterable[str] = ("post",), offset: int = 0) -> "Reference":
        """Keeps what every layer of `model` shows while it trains."""
        for one in find_layers(model, sites=tuple(sites)):
            place = one.layer + offset, one.site, one.expert
            if one.site == "post":
                one.module.register_forward_pre_hook(
                    lambda module, args, place=place: self.keep(args[0], *place) if module.training else None
                )
            else:
                one.module.register_forward_hook(
                    lambda module, _, out, place=place: self.keep(out, *place) if module.training else None
                )
        return self

    def assert_stored(self, store: Path, run_id: str, steps: Iterable[int]) -> dict[Key, dict[str, Any]]:
        """The run holds a record of each place at exactly these steps, equal to what was seen in them.

        Returns:
            The records, by key.
        """
        places = sorted({key[1:] for key in self.rows}, key=str)
        return self.assert_stored_keys(store, run_id, [Key(step, *place) for step in steps for place in places])

    def assert_stored_keys(self, store: Path, run_id: str, keys: Iterable[Key]) -> dict[Key, dict[str, Any]]:
        """The run holds exactly these records, equal to what was seen; a place that saw no token has none counted."""
        found = records(store, run_id)
        assert set(found) == set(keys)
        for key, record in found.items():
            seen = self.rows.get(key, [])
            assert record["tokens"] == sum(map(len, seen)), key
            assert record["complete"], key
            if record["tokens"]:
                assert distance(record["eigenvalues"], torch.cat(seen)) <= 1e-4, key
        return found


def records(store: Path, run_id: str) -> dict[Key, dict[str, Any]]:
    """What the store holds of a run, with the eigenvalues beside the record's columns."""
    with open_history(store) as history:
        rows = history.query("SELECT * FROM records WHERE run_id = ?", [run_id]).to_pylist()
        spectra = history.query("SELECT * FROM eigenvalues WHERE run_id = ?", [run_id]).to_pylist()
    by_key = {_key(one): one["eigenvalues"] for one in spectra}
    return {_key(one): one | {"eigenvalues": by_key.get(_key(one))} for one in rows}


def distance(eigenvalues: list[float], rows_ND: Tensor) -> float:
    """The largest error of these eigenvalues of the rows' covariance, relative to the first."""
    true = spectrum.eigenvalues(torch.cov(rows_ND.double().T))
    return float((torch.tensor(eigenvalues).double() - true).abs().max() / true[0])


def _key(row: dict[str, Any]) -> Key:
    return Key(row["step"], row["layer"], row["site"], row["expert"])
