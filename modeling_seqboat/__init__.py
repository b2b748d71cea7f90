"""SeqBoat for transformers: importing this package makes AutoConfig and the AutoModel classes know `seqboat`."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache_seqboat import SeqBoatCache
from .configuration_seqboat import SeqBoatConfig
from .modeling_seqboat import SeqBoatForCausalLM, SeqBoatModel, SeqBoatPreTrainedModel
from .tokenization_seqboat import build_byte_tokenizer

__version__ = "0.1.0"

AutoConfig.register("seqboat", SeqBoatConfig, exist_ok=True)
AutoModel.register(SeqBoatConfig, SeqBoatModel, exist_ok=True)
AutoModelForCausalLM.register(SeqBoatConfig, SeqBoatForCausalLM, exist_ok=True)

__all__ = [
    "SeqBoatCache",
    "SeqBoatConfig",
    "SeqBoatForCausalLM",
    "SeqBoatModel",
    "SeqBoatPreTrainedModel",
    "build_byte_tokenizer",
]
