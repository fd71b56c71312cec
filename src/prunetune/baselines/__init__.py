"""Two-stage methods to compare with: score the units of the dense model, prune it, and tune afterwards."""

from prunetune.baselines.registry import BASELINES, Baseline, Calibration, baseline
from prunetune.baselines.scores import bias_compensation  # importing the module registers its methods

__all__ = ["BASELINES", "Baseline", "Calibration", "baseline", "bias_compensation"]
