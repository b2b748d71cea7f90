"""A plug-in by which vLLM serves folders of a causal SeqBoat; the extra `vllm`, docs/serving.md."""

from typing import Any

import modeling_seqboat  # noqa: F401  transformers' Auto classes learn of the model.

ARCHITECTURE = "SeqBoatForCausalLM"


def register() -> None:
    """The entry point `vllm.general_plugins`: called in each process of vLLM."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:SeqBoatForVllm")
    MODELS_CONFIG_MAP[ARCHITECTURE] = _Settings


class _Settings:
    """What vLLM asks of its own models' classes of settings."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        pass

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Sets what follows from a state of constant size. Raises ValueError for what does not run."""
        from vllm.config import CompilationMode

        refuse(vllm_config)
        if vllm_config.compilation_config.mode is None:
            # The layers bring their kernels; decode steps are CUDA graphs all the same.
            vllm_config.compilation_config.mode = CompilationMode.NONE
        cache = vllm_config.cache_config
        cache.mamba_cache_mode = "none"
        # One page is a whole text's, however long.
        cache.mamba_block_size = vllm_config.model_config.max_model_len


def refuse(vllm_config: Any) -> None:
    """Raises ValueError for settings of vLLM under which SeqBoat does not run, by their names."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    caching = vllm_config.cache_config.enable_prefix_caching
    reasons = [
        (tensor > 1, f"tensor_parallel_size={tensor}: the layers are not cut; use data_parallel_size"),
        (pipeline > 1, f"pipeline_parallel_size={pipeline}: all layers share a page; use data_parallel_size"),
        (caching, "enable_prefix_caching=True: a state cannot be cut where two prompts part"),
        (vllm_config.speculative_config, "speculative_config: a state cannot drop tokens that were rejected"),
        (vllm_config.lora_config, "enable_lora=True: merge the adapter, merge_and_unload(), and serve what is saved"),
        (model.quantization, f"quantization={model.quantization!r}: weights are float32, bfloat16 or float16"),
        (model.runner_type != "generate", f"runner_type={model.runner_type!r}: it generates, and makes no embeddings"),
    ]
    wrong = [reason for applies, reason in reasons if applies]
    if wrong:
        raise ValueError(f"SeqBoat does not run in vLLM with {'; nor with '.join(wrong)}")
