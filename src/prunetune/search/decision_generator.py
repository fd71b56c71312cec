"""The pruning-decision generator (ATP, authors' code): a network from fixed layer vectors to one logit per unit.

L layers, E embedding width, U units of a site.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunetune.pruning.units import Site

EMBEDDING = 64  # width of a layer vector
HIDDEN = 128  # width of the GRU's output, both directions


class DecisionGenerator(nn.Module):
    """A small network over the layer sequence, and one linear head per site.

    `forward()` has no input and returns {site name: logits [U]}: the decision depends on the weights alone. The layer
    vectors are fixed and orthogonal, so that layers start out distinct. `kind` is "transformer" (two encoder layers,
    four heads, feed-forward 256, as in the authors' code) or "gru" (bidirectional).
    """

    def __init__(self, sites: Sequence[Site], *, kind: str, seed: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        layers = max(site.layer for site in sites) + 1
        self.register_buffer("layer_vectors", orthogonal_vectors(layers, EMBEDDING, rng))
        width = EMBEDDING if kind == "transformer" else HIDDEN
        with torch.random.fork_rng(devices=[]):  # modules draw from the global generator when they are created
            self.mixer: nn.Module
            if kind == "transformer":
                layer = nn.TransformerEncoderLayer(EMBEDDING, nhead=4, dim_feedforward=256, dropout=0.0)
                self.mixer = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
            else:
                self.mixer = nn.GRU(EMBEDDING, HIDDEN // 2, bidirectional=True)
            self.norm = nn.LayerNorm(width)
            self.heads = nn.ModuleList(nn.Linear(width, site.units) for site in sites)
        self.sites = tuple(sites)
        for name, parameter in self.named_parameters():
            _initialise(name, parameter, rng)

    def forward(self) -> dict[str, Tensor]:
        mixed = self.mixer(self.get_buffer("layer_vectors")[:, None, :])  # [L, 1, E]
        features: Tensor = self.norm(mixed[0] if isinstance(mixed, tuple) else mixed)[:, 0]
        return {site.name: head(features[site.layer]) for site, head in zip(self.sites, self.heads, strict=True)}


class FreeLogits(nn.Module):
    """The ablation of the generator, called in the same way: no network, one parameter per unit, zero at first."""

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()
        self.sites = tuple(sites)
        self.logits = nn.ParameterList(nn.Parameter(torch.zeros(site.units)) for site in sites)

    def forward(self) -> dict[str, Tensor]:
        return {site.name: logits for site, logits in zip(self.sites, self.logits, strict=True)}


def build_generator(sites: Sequence[Site], *, kind: str, seed: int) -> nn.Module:
    """The generator that `search.generator` names: "transformer", "gru", or "none" for `FreeLogits`."""
    return FreeLogits(sites) if kind == "none" else DecisionGenerator(sites, kind=kind, seed=seed)


def _initialise(name: str, parameter: nn.Parameter, rng: torch.Generator) -> None:
    """Xavier-uniform weights and zero biases, from the given random generator alone."""
    with torch.no_grad():
        if "bias" in name:
            parameter.zero_()
        if parameter.dim() < 2:
            return  # weights of norms are one
        bound = (6 / (parameter.shape[0] + parameter.shape[1])) ** 0.5
        parameter.uniform_(-bound, bound, generator=rng)


def orthogonal_vectors(rows: int, width: int, rng: torch.Generator) -> Tensor:
    """[rows, width] vectors of norm sqrt(width); each run of `width` rows from the first on is orthogonal."""
    blocks = [torch.linalg.qr(torch.randn(width, width, generator=rng))[0] for _ in range(-(-rows // width))]
    vectors: Tensor = torch.cat(blocks)[:rows] * width**0.5
    return vectors
