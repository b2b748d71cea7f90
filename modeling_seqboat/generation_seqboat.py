"""What `generate()` may do with a SeqBoat, and what differs between the versions of transformers.

Letters: B batch, L columns.
"""

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.generation import GenerationConfig, GenerationMixin, MaxLengthCriteria, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging
from transformers.utils.logging import tqdm

from .cache_seqboat import SeqBoatCache
from .configuration_seqboat import is_integer
from .context_seqboat import expect_same_past

logger = logging.get_logger(__name__)

# Columns of a prompt that are read at once where `prefill_chunk_size` does not say.
LONG_PREFILL = 32_768

# The first and the last release of transformers that all tests pass on.
OLDEST_TESTED, NEWEST_TESTED = "5.17", "5.24"

# What transformers calls the cache in outputs and inside generate(): `cache` from 5.24 on, `past_key_values` before.
# The class says so itself, a development version too.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
# All names under which callers may give it.
CACHE_NAMES = ("past_key_values", "cache", "cache_params")


def untested_version(version: str) -> str | None:
    """What to tell a user of a transformers newer than any that was tried, or None where there is nothing to tell."""
    if Version(version).release[:2] <= Version(NEWEST_TESTED).release[:2]:
        return None
    return (
        f"SeqBoat was tested with transformers {OLDEST_TESTED} to {NEWEST_TESTED}; this is {version}. Should "
        f'something break, `pip install "transformers=={NEWEST_TESTED}.*"` gives the newest version that is known to '
        "work"
    )


# A warning and no upper bound in the package's requirements: a bound would hold back a user's upgrade, whether
# anything breaks or not, and folders that bring their code with them have no requirements that pip reads.
if untested_version(transformers.__version__) is not None:
    logger.warning(untested_version(transformers.__version__))


def one_cache(**given: SeqBoatCache | None) -> SeqBoatCache | None:
    """The cache that a caller gave under any of `CACHE_NAMES`, or None.

    Raises:
        ValueError: if it is no SeqBoat cache, or if two names hold different ones.
    """
    named = {name: cache for name, cache in given.items() if cache is not None}
    caches = list(named.values())
    for name, cache in named.items():
        if not getattr(cache, "is_seqboat_cache", False):
            raise ValueError(
                f"{name} must be a SeqBoatCache, got {type(cache).__name__}, which has no place for the state of the "
                "recurrence; use SeqBoatCache(model.config). Adapters that give keys and values of their own (prefix "
                "tuning) do not go with SeqBoat; prompt tuning and p-tuning do"
            )
    if any(cache is not caches[0] for cache in caches[1:]):
        raise ValueError(
            f"{' and '.join(named)} are names of one argument and hold different caches: give one of them"
        )
    return caches[0] if caches else None


def _rename_cache(kwargs: dict) -> None:
    """Gives the cache among keyword arguments the name that this transformers looks for."""
    cache = one_cache(**{name: kwargs.pop(name) for name in CACHE_NAMES if name in kwargs})
    if cache is not None:
        kwargs[CACHE_NAME] = cache


def _refuse_uneven_positions(position_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raises ValueError unless positions rise by one from each real token to the next."""
    if position_ids.ndim != 2:
        raise ValueError(f"position_ids must be of shape (batch, length), got {tuple(position_ids.shape)}")
    width = position_ids.shape[1]
    real = torch.ones_like(position_ids) if attention_mask is None else attention_mask[:, -width:].long()
    if real.shape[1] != width:
        raise ValueError(f"position_ids has {width} columns, attention_mask {real.shape[1]}")
    real = real.to(position_ids.device)
    offset = position_ids - real.cumsum(1)
    low = offset.masked_fill(real == 0, torch.iinfo(torch.long).max).amin(1)
    uneven = (real.bool() & (offset != low[:, None])).any(1)
    if bool(uneven.any()):
        row = int(uneven.nonzero()[0])
        raise ValueError(
            f"generate() counts positions over real tokens itself; position_ids must rise by one from each real token "
            f"to the next, those of row {row} do not (give the attention_mask of a padded prompt too; forward() takes "
            "any positions)"
        )


def _refuse_misfits(inputs: Tensor | None, kwargs: dict) -> None:
    """Raises ValueError for the attention_mask of another prompt, which transformers leaves out if it is all ones, and
    where `generate` would cut the inputs at the wrong column, as it does without a word when new columns alone come
    with a filled cache and no mask tells."""
    cache, mask, embeds = (kwargs.get(name) for name in (CACHE_NAME, "attention_mask", "inputs_embeds"))
    past = 0 if cache is None else cache.get_seq_length()
    name = "input_ids" if embeds is None else "inputs_embeds"
    given = embeds if embeds is not None else kwargs.get("input_ids") if inputs is None else inputs
    if past == 0:
        plain = isinstance(mask, Tensor) and mask.ndim == 2 and given is not None and given.ndim >= 2
        if plain and mask.shape != given.shape[:2]:
            raise ValueError(
                f"attention_mask must be of shape {tuple(given.shape[:2])}, as {name} (a row for each prompt), got "
                f"{tuple(mask.shape)}"
            )
        return
    if mask is not None and mask.ndim == 2 and mask.shape[1] > past:
        expect_same_past(mask[:, :past], cache)
    if given is None:
        return
    width = given.shape[1]
    if mask is not None and mask.shape[1] != width:
        # New ids alone, behind a mask of the whole text.
        if embeds is None and mask.shape[1] == past + width:
            return
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns, {name} {width}, and past_key_values {past}: the mask must "
            "cover the whole text"
        )
    if width <= past:
        raise ValueError(
            f"past_key_values holds {past} columns and {name} has {width}: generate() takes the whole text, cached "
            "part included, with at least one column that the cache lacks; new input_ids alone need an "
            f"attention_mask of the whole text ({past + width} columns)"
        )


class SeqBoatGenerationMixin(GenerationMixin):
    """transformers' `GenerationMixin` over a `SeqBoatCache`. The cache is accepted under each of `CACHE_NAMES`."""

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *args, **kwargs
    ):
        """`GenerationMixin.generate`.

        A prompt padded on the right gets a warning, since its last column is read. Positions are counted by the model;
        `position_ids` that say the same up to one offset a row are accepted (only differences of positions matter),
        others raise ValueError.

        A prompt longer than `LONG_PREFILL` columns is read in chunks of that many, so that its memory is constant;
        `prefill_chunk_size` says otherwise. A bar shows the progress of a prefill in chunks that takes more than ten
        seconds.

        Args:
            prefill_progress: False for no bar, True for one at once, or a function that is called after each chunk
                with the columns read and the columns to be read in all.
        """
        _rename_cache(kwargs)
        if kwargs.get("output_router_probs"):
            raise ValueError(
                "generate() returns no router_probs: give forward() the generated text with output_router_probs=True"
            )
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > 0 and bool((mask[:, -1] == 0).any()):
            logger.warning(
                "generate() continues from the last column, which is padding in some rows: pad on the left "
                "(tokenizer.padding_side = 'left')"
            )
        # A draft model is handed what the loop around it keeps, not the user's.
        if not getattr(generation_config, "is_assistant", False):
            if kwargs.get("position_ids") is not None:
                _refuse_uneven_positions(kwargs["position_ids"], mask)
            _refuse_misfits(inputs, kwargs)
        return super().generate(inputs, generation_config, *args, **kwargs)

    def generate_batch(self, *args, **kwargs):
        raise NotImplementedError(
            "SeqBoat does not run under paged continuous batching: its state has a constant size and no pages; "
            "use generate() with a padded batch"
        )

    def init_continuous_batching(self, *args, **kwargs):
        self.generate_batch()

    def prepare_inputs_for_generation(
        self, input_ids, *args, inputs_embeds=None, prefill_progress=None, tokenizer=None, assistant_tokenizer=None,
        assistant_model=None, **kwargs,
    ):  # fmt: skip
        """Positions are counted by the model, from the cache on. For a static cache the mask is cut to the new
        columns: the padding before them is in the state already, and its width would change at every step. The
        tokenizers, which generate() hands on, are for its stopping criteria alone; a draft model it hands on to beam
        search, having warned that it is not used."""
        _rename_cache(kwargs)
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        if getattr(inputs.get(CACHE_NAME), "is_seqboat_cache", False):
            given = inputs.get("inputs_embeds")
            length = (inputs["input_ids"] if given is None else given).shape[1]
            if CACHE_NAME != "past_key_values":
                # PEFT's prompt learning looks for the cache under its old name.
                inputs["past_key_values"] = inputs[CACHE_NAME]
            mask = inputs.get("attention_mask")
            if mask is not None and inputs[CACHE_NAME].is_compileable:
                # A copy: the strides of a view grow with the text, and a compiled step would be compiled anew.
                inputs["attention_mask"] = mask[:, -length:].clone(memory_format=torch.contiguous_format)
            inputs.pop("position_ids", None)
        return inputs

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """transformers' loop over chunks shows nothing of its progress, cuts no embeddings, and reads what a filled
        cache holds once more before 5.18."""
        progress = model_kwargs.pop("prefill_progress", None)
        embeds, cache, mask = (model_kwargs.get(name) for name in ("inputs_embeds", CACHE_NAME, "attention_mask"))
        by_embeds = embeds is not None and is_first_iteration
        given, first = embeds if by_embeds else input_ids, 0
        size = generation_config.prefill_chunk_size
        if size is not None and (not is_integer(size) or size < 1):
            raise ValueError(f"prefill_chunk_size must be an integer of at least 1 or None, got {size!r}")
        if cache is not None:
            # Ids narrower than the mask are the new ones alone. From 5.18 on a mask of ones is left out.
            unmasked = getattr(generation_config, "_mask_length", given.shape[1])
            width = unmasked if mask is None else mask.shape[1]
            first = cache.get_seq_length() if by_embeds or width == given.shape[1] else 0
        if size is None and given.shape[1] - first > LONG_PREFILL:
            size = LONG_PREFILL
        if cache is None or size is None or first >= given.shape[1]:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        start = end = cache.get_seq_length()
        total, delay, hidden = given.shape[1] - first, 0 if progress else 10, progress is False or callable(progress)
        with tqdm(total=total, desc="prefill", unit="tokens", unit_scale=True, delay=delay, disable=hidden) as bar:
            for chunk in given[:, first:].split(size, dim=1):
                end += chunk.shape[1]
                ids, part = chunk, model_kwargs | {"attention_mask": None if mask is None else mask[:, :end]}
                if by_embeds:
                    ids, part["inputs_embeds"] = input_ids, chunk
                inputs = self.prepare_inputs_for_generation(ids, is_first_iteration=is_first_iteration, **part)
                outputs = self(**inputs, return_dict=True)
                bar.update(chunk.shape[1])
                if callable(progress):
                    progress(end - start, total)
        return outputs

    def _get_stopping_criteria(self, *args, **kwargs) -> StoppingCriteriaList:
        """Without the warning of a text longer than `max_position_embeddings`: that is the reach of a table of
        relative positions, which clamps what is further away."""
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                criterion.max_position_embeddings = None
        return criteria

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
        """A padding mask is all SeqBoat needs, for a static cache too."""
        return attention_mask

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        implementation = generation_config.cache_implementation
        if model_kwargs.get(CACHE_NAME) is not None:
            if generation_config.use_cache is False:
                raise ValueError(
                    "use_cache=False contradicts past_key_values: without a cache every step reads the whole text, "
                    "which the given one would take for new; leave one of them out"
                )
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            return
        if generation_config.use_cache is False:
            return
        if implementation not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation must be None, 'dynamic' or 'static' for SeqBoat, got {implementation!r}: the "
                "state has a constant size and is neither offloaded nor quantised by generate()"
            )
        cache = SeqBoatCache(self.config, static=implementation == "static")
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[CACHE_NAME] = cache
