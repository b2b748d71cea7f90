"""Byte-level tokenizer: ids 0 to 255 are the bytes of UTF-8 text, the specials follow."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|mask|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

# The generation block marks what an assistant said, for losses on these tokens alone. A content is a text, or a list
# of parts of type text, as servers write them; `developer` is a newer name of the system's role.
CHAT_TEMPLATE = (
    "{%- macro text_of(content) -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- elif content is sequence and content is not mapping -%}"
    "{%- for part in content -%}"
    "{%- if part is string -%}{{- part -}}"
    "{%- elif part is mapping and part.get('type') in ('text', 'input_text') and part.get('text') is string -%}"
    "{{- part['text'] -}}"
    "{%- else -%}{{- raise_exception('a part of a content must be a text or of type text') -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- else -%}{{- raise_exception('a content must be a text or a list of parts of type text') -}}{%- endif -%}"
    "{%- endmacro -%}"
    "{%- for message in messages -%}"
    "{%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}"
    "{%- if role not in ('system', 'user', 'assistant') -%}"
    "{{- raise_exception('a role must be system, developer, user or assistant, not ' ~ message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + role + '|>' -}}"
    "{%- if role == 'assistant' -%}"
    "{%- generation -%}{{- text_of(message['content']) + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- text_of(message['content']) + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_byte_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Build the byte tokenizer: ids 0..255 are bytes, 256..263 `<|pad|> <|bos|> <|eos|> <|mask|> <|system|> <|user|>
    <|assistant|> <|end|>`; 264 ids in all.

    A text becomes one id per UTF-8 byte, nothing is normalised and nothing is added, so that it equals
    `np.frombuffer(text.encode(), np.uint8)` and decodes to itself. A special's spelling in a text is read as that
    special; with `split_special_tokens=True` it stays bytes, which is what data of unknown origin needs. Padding goes
    to the left. `save_pretrained` writes a plain `tokenizer.json` that AutoTokenizer loads without code of this
    package.

    Args:
        chat: whether it has a chat template. Tokenizers of encoders should have none: sentence-transformers writes
            every text as a chat where there is one.
    """
    # Printable Latin-1 stands for its own byte, the symbols from U+0100 on for the other bytes in order.
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [ord(symbol) for symbol in symbols if symbol < "\u0100"]
    ids = [*printable, *sorted({*range(256)} - {*printable})]
    backend = Tokenizer(models.BPE(vocab=dict(zip(symbols, ids, strict=True)), merges=[]))
    # Without the regular expression a text is one piece, and no blank is treated specially.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    roles = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>", "mask_token": "<|mask|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        padding_side="left",
        model_max_length=10**30,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE if chat else None,
        **roles,
    )
