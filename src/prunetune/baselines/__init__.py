"""Two-stage methods to compare with: score the dense model's units or search for a plan, prune, tune afterwards."""

from prunetune.baselines.plans import generator  # importing these modules registers their methods
from prunetune.baselines.registry import BASELINES, Baseline, Calibration, baseline
from prunetune.baselines.scores import bias_compensation

__all__ = ["BASELINES", "Baseline", "Calibration", "baseline", "bias_compensation", "generator"]
