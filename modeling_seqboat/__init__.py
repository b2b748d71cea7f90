"""SeqBoat for transformers: importing this package makes AutoConfig and the AutoModel classes know `seqboat`."""

import transformers

from .cache_seqboat import SeqBoatCache
from .configuration_seqboat import SeqBoatConfig
from .heads_seqboat import (
    SeqBoatForAudioClassification,
    SeqBoatForImageClassification,
    SeqBoatForMaskedLM,
    SeqBoatForQuestionAnswering,
    SeqBoatForSequenceClassification,
    SeqBoatForTokenClassification,
)
from .modeling_seqboat import AUTO_CLASSES, SeqBoatForCausalLM, SeqBoatModel, SeqBoatPreTrainedModel
from .tokenization_seqboat import build_byte_tokenizer

__version__ = "0.1.0"

transformers.AutoConfig.register("seqboat", SeqBoatConfig, exist_ok=True)
for _auto_class, _model_class in AUTO_CLASSES.items():
    getattr(transformers, _auto_class).register(SeqBoatConfig, globals()[_model_class], exist_ok=True)

__all__ = [
    "SeqBoatCache",
    "SeqBoatConfig",
    "SeqBoatForAudioClassification",
    "SeqBoatForCausalLM",
    "SeqBoatForImageClassification",
    "SeqBoatForMaskedLM",
    "SeqBoatForQuestionAnswering",
    "SeqBoatForSequenceClassification",
    "SeqBoatForTokenClassification",
    "SeqBoatModel",
    "SeqBoatPreTrainedModel",
    "build_byte_tokenizer",
]
