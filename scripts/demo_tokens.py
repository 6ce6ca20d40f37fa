"""The demo model's tokens: byte-level BPE, five special tokens, a chat template, arrays of ids.

Knows documents as text; knows nothing of where they come from or of training.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from checkpoint_files import write_json
from demo_text import Document
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END, RETURN, START, MESSAGE, STOP = SPECIAL = (
    "<|endoftext|>",
    "<|return|>",
    "<|start|>",
    "<|message|>",
    "<|end|>",
)
END_ID, RETURN_ID = 0, 1
# Words keep a leading space or mark, digits go by three, line breaks stick to what they follow.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = """\
{%- for message in messages -%}
<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start|>assistant<|message|>
{%- endif -%}
"""


def rendered(document: Document) -> str:
    """The document as the model reads it, closed by the token that ends a generation."""
    if document.kind == "page":
        return document.text + END
    asked = f"{START}user{MESSAGE}{document.question}{STOP}{START}assistant{MESSAGE}"
    return asked + document.text + RETURN


def held_out(document: Document) -> bool:
    """One page of the subject in 32, whole, by a hash of its path."""
    return hashlib.sha256(document.source.encode()).digest()[0] % 32 == 0


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIAL), initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, positions: int) -> None:
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = {
        "clean_up_tokenization_spaces": False,
        "eos_token": RETURN,
        "model_max_length": positions,
        "pad_token": END,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", config)


def encoded(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """All texts' ids one after another, and where each begins."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    starts = np.cumsum([0] + [len(one) for one in ids])[:-1]
    return np.concatenate([np.array(one, dtype=np.uint16) for one in ids]), starts.astype(np.int64)


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text that each id stands for; a special token stands for none."""
    names = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    return np.array(
        [0 if name in SPECIAL else len(name) for name in names]
    )  # a byte is a character
