"""The source text that generated modules are put together from; existing checkpoints are compared with it."""

from string import Template

CONFIGURATION_TEMPLATE = Template('''\
"""Configuration of a model whose layers differ in width. Written by prunetune; needs transformers >= 5.14."""

# Of $digest. A process that opens two such folders of one name takes the first one's classes for both, unless these
# files differ, too.

from transformers import $config


class $pruned_config($config):
    model_type = "$model_type"

    def validate(self):  # on saving, of numbers that all layers would share
        """Widths are checked layer by layer when the model is built."""
''')

MODELING_TEMPLATE = Template('''\
"""A $causal whose layers differ in width. Written by prunetune; needs transformers >= 5.14."""

import copy

import torch
from torch import nn
from transformers import $causal, $base
$conv
from .configuration_pruned import $pruned_config

$helpers
def dense(config):
    plain = copy.copy(config)
    plain.per_layer_config = None
    return plain


$resizers

def resize(model, layers, config):
    for kernels in ("_attn_implementation", "_experts_implementation"):
        setattr(config, kernels, getattr(model.config, kernels))
    for module in model.modules():
        if hasattr(module, "config") and "Rotary" not in type(module).__name__:  # angles are the dense model's
            module.config = config
    for layer, own in zip(layers, config.per_layer_config):
$lines

class $pruned_base($base):
    config_class = $pruned_config

    def __init__(self, config):
        super().__init__(dense(config))
        resize(self, self.$layers, config)


class $pruned_causal($causal):
    config_class = $pruned_config

    def __init__(self, config):
        super().__init__(dense(config))
        resize(self, self.$inner.$layers, config)
''')

NO_ATTENTION = """
class NoAttention(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return torch.zeros_like(hidden_states), None

"""

RESIZED = """\
def resized(linear, rows=None, columns=None):
    return nn.Linear(columns or linear.in_features, rows or linear.out_features, bias=linear.bias is not None,
                     device=linear.weight.device, dtype=linear.weight.dtype)

"""

RESIZED_TRANSPOSED = """\
def resized(linear, rows=None, columns=None):
    with linear.weight.device:
        return Conv1D(rows or linear.nf, columns or linear.nx).to(linear.weight.dtype)

"""

SHORTER = """
def shorter(parameter, axis, size):
    shape = [*parameter.shape[:axis], size, *parameter.shape[axis + 1:]]
    return nn.Parameter(torch.empty(shape, device=parameter.device, dtype=parameter.dtype))

"""

NO_LINEAR = """
class NoLinear(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, hidden_states):
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.rows)

"""

NO_MIXTURE = """
class NoMixture(nn.Module):
    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)

"""

NO_MIXTURE_WITH_SCORES = """
class NoMixture(nn.Module):
    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states), None

"""

OWN_HEADS = """
class OwnHeads:
    def __init__(self, config, heads):
        self.__dict__.update(shared=config, num_attention_heads=heads)

    def __getattr__(self, name):
        return getattr(self.shared, name)

"""
