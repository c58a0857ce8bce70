"""A witness beside eigenwatch: hooks of the test's own keep what each step showed, and the store must agree."""

from collections.abc import Callable
from pathlib import Path

import torch
from eigenwatch import spectrum
from eigenwatch.agent import find_layers
from eigenwatch.history import open_history
from torch import Tensor, nn


class Witness:
    """Keeps the activations of every training forward under the step that it belongs to."""

    def __init__(self, model: nn.Module, step: Callable[[], int]) -> None:
        self.rows: dict[tuple[int, int], list[Tensor]] = {}
        """(N, D) of each forward, by (step, layer); padding is left out."""
        self._mask: Tensor | None = None
        model.register_forward_pre_hook(self._keep_mask, with_kwargs=True)
        for one in find_layers(model):
            one.module.register_forward_pre_hook(self._keeper(one.layer, step))

    def reference(self, step: int, layer: int) -> tuple[Tensor, int]:
        """Eigenvalues and tokens of what really came in, in float64."""
        x_ND = torch.cat(self.rows[step, layer]).double()
        return spectrum.eigenvalues(torch.cov(x_ND.T)), len(x_ND)

    def assert_agrees(self, store: Path, run_id: str, steps: list[int]) -> None:
        """The run holds a record of every layer at exactly these steps, each equal to what its own step showed."""
        layers = sorted({layer for _, layer in self.rows})
        with open_history(store) as history:
            records = history.query("SELECT * FROM records WHERE run_id = ? ORDER BY step, layer", [run_id]).to_pylist()
            spectra = history.query("SELECT * FROM eigenvalues WHERE run_id = ?", [run_id]).to_pylist()
        assert [(one["step"], one["layer"]) for one in records] == [(s, k) for s in steps for k in layers]
        stored = {(one["step"], one["layer"]): torch.tensor(one["eigenvalues"]).double() for one in spectra}
        for record in records:
            key = record["step"], record["layer"]
            expected, tokens = self.reference(*key)
            assert record["tokens"] == tokens, key
            assert record["complete"]
            assert _distance(stored[key], expected) <= 1e-4, key
            for neighbour in (key[0] - 1, key[0] + 1):  # or a shifted label would not be noticed
                if (neighbour, key[1]) in self.rows:
                    assert _distance(self.reference(neighbour, key[1])[0], expected) > 1e-3, key

    def _keep_mask(self, _module: nn.Module, _arguments: tuple, keywords: dict) -> None:
        self._mask = keywords.get("attention_mask")

    def _keeper(self, layer: int, step: Callable[[], int]) -> Callable:
        @torch.compiler.disable
        def keep(module: nn.Module, arguments: tuple[Tensor]) -> None:
            if module.training:
                rows_ND = arguments[0].detach().flatten(0, 1)
                if self._mask is not None:
                    rows_ND = rows_ND[self._mask.flatten().bool()]
                self.rows.setdefault((step(), layer), []).append(rows_ND.clone())

        return keep


def _distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two spectra, relative to the first eigenvalue."""
    return float((found - expected).abs().max() / expected[0])
