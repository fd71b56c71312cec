"""A graph that `export --to onnx` wrote, as a model of transformers: `eval`, `check` and `bench` run it in onnxruntime.

The graph has no key-value cache. What stands for one here is the tokens so far: every step runs all of them again.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from prunetune.utils.failures import reading_model_files
from prunetune.utils.optional import require_installed

GRAPH_FILE = "model.onnx"


def is_onnx_folder(path: Path) -> bool:
    """Whether the folder's model is a graph."""
    return (path / GRAPH_FILE).is_file()


def onnx_files(path: Path) -> list[Path]:
    """The graph and its weights."""
    return sorted(path.glob(f"{GRAPH_FILE}*"))


class OnnxModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc] # transformers has no types here
    """Ids [B, T] -> logits [B, T, V] in float32, on the CPU. Raises `MissingPackage`, and `ModelError` for no graph."""

    _is_stateful = True  # sequences are not padded on the left, and none goes on from another's cache

    def __init__(self, name: str, folder: Path, config: Any) -> None:
        require_installed("onnxruntime", extra="onnx", use=f"model {name}")
        import onnxruntime

        super().__init__(config)
        with reading_model_files(f"model {name}: {GRAPH_FILE} cannot be opened", "export it again"):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            self.session = onnxruntime.InferenceSession(
                folder / GRAPH_FILE, options, providers=["CPUExecutionProvider"]
            )
        self.runtime = f"onnxruntime {version('onnxruntime')}"
        # Shared weights are stored once; constants of the graph itself are not counted.
        self.stored_values = sum(file.stat().st_size for file in onnx_files(folder)[1:]) // 4
        self.head = nn.Identity()  # at which callers choose the positions whose logits they want
        self.anchor = nn.Parameter(torch.empty(0), requires_grad=False)  # tells transformers device and dtype

    def get_output_embeddings(self) -> nn.Module:
        """Where logits leave."""
        return self.head

    def num_parameters(self, *_: Any, **__: Any) -> int:
        """Values in the file of weights."""
        return self.stored_values

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> dict[str, Any]:
        """All tokens, at every step."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] of the given tokens, which follow those that `past_key_values` was called with before."""
        tokens = input_ids
        if past_key_values is not None:
            tokens = torch.cat([getattr(past_key_values, "token_ids", input_ids[:, :0]), input_ids], dim=1)
            past_key_values.token_ids = tokens
        mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
        (values,) = self.session.run(["logits"], {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})
        logits = torch.from_numpy(values)[:, -(logits_to_keep or input_ids.shape[1]) :]
        return CausalLMOutputWithPast(logits=self.head(logits), past_key_values=past_key_values)
