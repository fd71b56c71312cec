"""E6: time and extra memory of cutting a model in memory, its adapters merged on the way.

    python benchmarks/cut_memory.py [--geometry llama-3-8b] [--layers 32] [--rank 16] [--keep 0.6] [--device cuda]
        [--quantize nf4] [--beside]

Random weights in the geometry of the model named, made in place layer by layer; a per-layer plan that keeps `--keep` of
every site's units, spread over it. The extra memory is the peak during the cut over what the model held before: on CUDA
of allocated bytes, on a CPU of the resident set (the kernel's high-water mark). Bars: 30 s, one layer of the model.
`--rank 0`: no adapters, so nothing is merged. `--quantize nf4`: a base in 4 bits, cut and left so. `--beside`: adapters
stay, and a teacher that has shared the model's weights lends it what stays.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from geometries import GEOMETRIES, made

from prunetune.config.recipe import LoraSettings
from prunetune.plan import Plan
from prunetune.pruning.cut import cut, cut_linears
from prunetune.pruning.teacher_student_weights import copy_sharing_weights, cut_sharing_weights
from prunetune.pruning.units import Site
from prunetune.train.adapters import add_adapters, trainable_parameters
from prunetune.utils.environment import device_name


def plan_of(sites: tuple[Site, ...], keep: float) -> Plan:
    """The same share of every site, the units that stay spread evenly over it."""
    kept = {}
    for site in sites:
        count = max(site.min_units_per_group, int(keep * site.units))
        kept[site.name] = tuple(sorted({index * site.units // count for index in range(count)}))
    return Plan(kept, {site.name: site.units for site in sites})


class Gauge:
    """Bytes held now, and the most since the last reset."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        return _resident("VmRSS")

    def peak(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        return _resident("VmHWM")

    def now(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else _resident("VmRSS")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", default="llama-3-8b", choices=GEOMETRIES)
    parser.add_argument("--layers", type=int, default=0, help="0: all of them")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--quantize", default="off", choices=["off", "nf4"])
    parser.add_argument("--beside", action="store_true", help="a teacher that shares the model's weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    model, sites = made(args.geometry, device, torch.bfloat16, layers=args.layers, quantize=args.quantize)
    layer_bytes = _layer_bytes(model)
    lender = copy_sharing_weights(model) if args.beside else None
    if args.rank:
        add_adapters(model, sites, LoraSettings(rank=args.rank), seed=0)
        for name, weight in trainable_parameters(model).items():
            if ".lora_B." in name:
                torch.nn.init.normal_(weight, std=0.01)
    plan, gauge = plan_of(sites, args.keep), Gauge(device)
    before, started = gauge.reset(), time.perf_counter()
    if lender is not None:
        cut_sharing_weights(model, lender, plan, sites=sites)
    elif args.quantize == "off":
        cut(model, plan, sites=sites)
    else:
        cut_linears(model, plan, sites=sites)
    peak, seconds = gauge.peak(), time.perf_counter() - started
    print(json.dumps({
        "geometry": args.geometry, "layers": model.config.num_hidden_layers, "quantize": args.quantize,
        "rank": args.rank, "keep": args.keep, "beside": args.beside, "device": device_name(device),
        "torch": torch.__version__,
        "seconds": round(seconds, 2), "before_gb": before / 1e9, "after_gb": gauge.now() / 1e9,
        "extra_mb": (peak - before) / 1e6, "layer_mb": layer_bytes / 1e6,
        "extra_in_layers": round((peak - before) / layer_bytes, 3),
    }))  # fmt: skip


def _layer_bytes(model: Any) -> int:
    layer = model.get_decoder().layers[0]
    held = [*layer.parameters(), *layer.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


if __name__ == "__main__":
    main()
