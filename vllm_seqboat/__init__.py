"""SeqBoat for vLLM, a plug-in: `pip install "seqboat-transformers[vllm]"`, and vLLM serves folders of a causal SeqBoat."""

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
        refuse(vllm_config)
        cache = vllm_config.cache_config
        cache.mamba_cache_mode = "none"
        # One page is a whole text's, however long.
        cache.mamba_block_size = vllm_config.model_config.max_model_len


def refuse(vllm_config: Any) -> None:
    """Raises ValueError for settings of vLLM under which SeqBoat does not run, by their names."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    reasons = {
        f"tensor_parallel_size={parallel.tensor_parallel_size}: the layers are not cut over GPUs; use "
        "data_parallel_size": parallel.tensor_parallel_size > 1,
        f"pipeline_parallel_size={parallel.pipeline_parallel_size}: all layers share a page; use "
        "data_parallel_size": parallel.pipeline_parallel_size > 1,
        "enable_prefix_caching=True: a state cannot be cut where prefixes part": vllm_config.cache_config
        .enable_prefix_caching,
        "speculative_config: a state cannot drop the tokens that were rejected": vllm_config.speculative_config
        is not None,
        "enable_lora=True: merge the adapter (`merge_and_unload`) and serve the folder that it is saved "
        "to": vllm_config.lora_config is not None,
        f"quantization={model.quantization!r}: weights are float32, bfloat16 or float16": model.quantization
        is not None,
        f"runner_type={model.runner_type!r}: it generates, and makes no embeddings": model.runner_type != "generate",
    }
    wrong = [reason for reason, applies in reasons.items() if applies]
    if wrong:
        raise ValueError(f"SeqBoat does not run in vLLM with {'; nor with '.join(wrong)}")
