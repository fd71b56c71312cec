"""The pruning-decision generator (ATP, authors' code): a network from fixed layer vectors to one logit per unit.

L layers, E embedding width, U units of a site.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunetune.pruning.units import Site

# Authors' code:
EMBEDDING = 64  # width of a layer vector
HEADS, FEED_FORWARD, DROPOUT = 4, 256, 0.1  # of each of the transformer's two layers


class EncoderLayer(nn.Module):
    """A transformer encoder layer (Vaswani et al. 2017: norms behind the sums) that is told what to drop.

    PyTorch's own draws its dropout from the process's random state, which runs in other threads change.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queries_keys_values, self.mixed = nn.Linear(EMBEDDING, 3 * EMBEDDING), nn.Linear(EMBEDDING, EMBEDDING)
        self.up, self.down = nn.Linear(EMBEDDING, FEED_FORWARD), nn.Linear(FEED_FORWARD, EMBEDDING)
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(EMBEDDING), nn.LayerNorm(EMBEDDING)

    def forward(self, x: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
        """[L, E] -> [L, E]; `drop` is applied where an encoder layer has dropout."""
        heads = self.queries_keys_values(x).view(len(x), 3, HEADS, -1)
        queries, keys, values = heads.permute(1, 2, 0, 3)  # [HEADS, L, E / HEADS] each
        attention = drop(torch.softmax(queries @ keys.mT / queries.shape[-1] ** 0.5, -1))
        x = self.attention_norm(x + drop(self.mixed((attention @ values).transpose(0, 1).flatten(1))))
        output: Tensor = self.feed_forward_norm(x + drop(self.down(drop(F.relu(self.up(x))))))
        return output


class DecisionGenerator(nn.Module):
    """A small transformer over the layer sequence, and one linear head per site.

    The decision has no input: it depends on the weights alone. The layer vectors are fixed and orthogonal, so that
    layers start out distinct.
    """

    def __init__(self, sites: Sequence[Site], *, seed: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        layers = max(site.layer for site in sites) + 1
        self.register_buffer("layer_vectors", orthogonal_vectors(layers, EMBEDDING, rng))
        with torch.random.fork_rng(devices=[]):  # modules draw from the global generator when they are created
            self.encoder = nn.ModuleList(EncoderLayer() for _ in range(2))
            self.norm = nn.LayerNorm(EMBEDDING)
            self.heads = nn.ModuleList(nn.Linear(EMBEDDING, site.units, bias=False) for site in sites)
        self.sites = tuple(sites)
        for name, parameter in self.named_parameters():  # weights as `nn.Linear` draws them, but zero biases
            if parameter.dim() > 1:
                bound = parameter.shape[1] ** -0.5
                parameter.data.uniform_(-bound, bound, generator=rng)
            elif "bias" in name:
                parameter.data.zero_()

    def forward(self, dropout_rng: torch.Generator | None = None) -> dict[str, Tensor]:
        """{site: logits [U]}; with a random generator, dropout is drawn from it."""

        def drop(x: Tensor) -> Tensor:
            if dropout_rng is None:
                return x
            return x * (torch.rand(x.shape, generator=dropout_rng) >= DROPOUT).to(x.device) / (1 - DROPOUT)

        x = self.get_buffer("layer_vectors")
        for layer in self.encoder:
            x = layer(x, drop)
        features = self.norm(x)
        return {site.name: head(features[site.layer]) for site, head in zip(self.sites, self.heads, strict=True)}


def orthogonal_vectors(rows: int, width: int, rng: torch.Generator) -> Tensor:
    """[rows, width] vectors of norm 1; each run of `width` rows from the first on is orthogonal."""
    blocks = [torch.linalg.qr(torch.randn(width, width, generator=rng))[0] for _ in range(-(-rows // width))]
    return torch.cat(blocks)[:rows]
