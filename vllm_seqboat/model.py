"""SeqBoat as a model of vLLM: flat tokens of many requests in, hidden states out, each request's state in a page.

Letters: R requests, T tokens of one forward, D channels.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from modeling_seqboat import SeqBoatForCausalLM

from . import refuse
from .pages import PagedCache, page_layout


class _Pages(nn.Module, MambaBase):
    """Where vLLM looks for what a page holds and leaves the pool. One for all layers."""

    mamba_type = MambaAttentionBackendEnum.LINEAR

    def __init__(self, vllm_config: VllmConfig, name: str):
        super().__init__()
        self.layout = page_layout(vllm_config.model_config.hf_config, vllm_config.model_config.dtype)
        self.kv_cache: tuple[Tensor, ...] = ()
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return tuple(shape for shape, _ in self.layout.values())

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return tuple(dtype for _, dtype in self.layout.values())


class SeqBoatForVllm(nn.Module, HasInnerState, IsAttentionFree):
    """A causal SeqBoat of this project, run on vLLM's batches. `__init__` raises ValueError for what it refuses."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        refuse(vllm_config)
        self.config = vllm_config.model_config.hf_config
        self.model = SeqBoatForCausalLM(self.config).eval()
        # vLLM reads a number out of the name.
        self.name = f"{prefix}.layers.0.state".lstrip(".")
        self.pages = _Pages(vllm_config, self.name)
        self.cache: PagedCache | None = None

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """input_ids, positions: (T,), request after request, those of one token first -> (T, D)."""
        if inputs_embeds is not None:
            raise ValueError("SeqBoat takes no prompt embeddings in vLLM: give token ids")
        found = get_forward_context().attn_metadata
        input_ids = input_ids.long()
        if found is None:
            # vLLM measures the memory of a forward before there are pages.
            return self.model.model(input_ids=input_ids[None], use_cache=False).last_hidden_state[0]
        if self.cache is None or self.cache.pool["values"] is not self.pages.kv_cache[2]:
            self.cache = PagedCache(self.config, list(self.pages.kv_cache))
        found = found[self.name]
        # Requests that fill up a batch have a negative page, or the first, which is nobody's.
        pages = found.state_indices_tensor.long().clamp_min(0)
        steps = found.num_decode_tokens
        parts = []
        if steps:
            parts.append(self.cache.step(self.model, input_ids[:steps], pages[:steps], positions[:steps]))
        if found.num_prefills:
            first = found.num_decodes
            borders = found.query_start_loc[first : first + found.num_prefills + 1].tolist()
            texts = [input_ids[begin:end] for begin, end in zip(borders[:-1], borders[1:], strict=True)]
            starts = positions[found.query_start_loc[first : first + found.num_prefills]].tolist()
            parts += self.cache.prompts(self.model, texts, pages[first:].tolist(), starts)
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
        missing = input_ids.shape[0] - hidden.shape[0]
        return nn.functional.pad(hidden, (0, 0, 0, missing)) if missing else hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.model.lm_head(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Takes tensors by the names that `save_pretrained` gives them, of the language model or of the model without
        its head. Raises ValueError for others."""
        own, loaded = dict(self.model.named_parameters()) | dict(self.model.named_buffers()), set()
        for name, tensor in weights:
            known = next((known for known in (name, f"model.{name}") if known in own), None)
            if known is None and name == "lm_head.weight":
                # Tied, and listed once.
                continue
            if known is None:
                raise ValueError(f"the weights hold {name}, which SeqBoat does not have")
            if own[known].shape != tensor.shape:
                raise ValueError(f"{name} is of shape {tuple(tensor.shape)}, expected {tuple(own[known].shape)}")
            with torch.no_grad():
                own[known].copy_(tensor)
            loaded.add(f"model.{known}")
        return loaded

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        model = vllm_config.model_config
        return tuple(shape for shape, _ in page_layout(model.hf_config, model.dtype).values())

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        model = vllm_config.model_config
        return tuple(dtype for _, dtype in page_layout(model.hf_config, model.dtype).values())
