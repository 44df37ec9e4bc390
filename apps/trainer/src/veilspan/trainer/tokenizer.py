"""Text to token ids: one token per byte, or a tokenizer from a local folder."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from veilspan.trainer.errors import ModelError
from veilspan.trainer.recipe import Recipe

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer in which token `b` is byte `b` of the UTF-8 text.

    It is a real Hugging Face tokenizer of 259 tokens: 256 bytes, then begin, end and padding. An
    exported model folder therefore loads with `AutoTokenizer` and needs no code of ours.

    Guarantee:
        It is fixed. A tokenizer trained on private text would publish parts of that text.

    Examples:
        >>> byte_tokenizer()("ab").input_ids
        [256, 97, 98]
    """
    names = _byte_names()
    vocabulary = {names[byte]: byte for byte in range(256)}
    vocabulary |= {BEGIN: 256, END: 257, PAD: 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, 256)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD
    )


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the tokenizer that `data.tokenizer` names.

    Raises:
        ModelError: If the folder is missing, holds no tokenizer, or needs code from the folder.
    """
    if recipe.data.tokenizer == "bytes":
        return byte_tokenizer()
    if recipe.data.tokenizer == "auto":
        assert recipe.model.path is not None  # Recipe refuses "auto" without a path
        return _from_folder(recipe.model.path, "model.path")
    return _from_folder(Path(recipe.data.tokenizer), "data.tokenizer")


def _from_folder(folder: Path, key: str) -> PreTrainedTokenizerBase:
    if not folder.is_dir():
        raise ModelError(f"{key} is {str(folder)!r}, which is no folder; give a local folder.")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(
            f"{key} is {str(folder)!r}, a folder without a tokenizer ({', '.join(_TOKENIZER_FILES)}"
            '); set data.tokenizer to "bytes" or to a folder that holds one.'
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken folder fails in as many ways as there are tokenizers
        raise ModelError(f"The tokenizer in {folder} ({key}) does not load: {error}") from error


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def _byte_names() -> list[str]:
    """Return the printable character that stands for each byte, as GPT-2 introduced it."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    names, next_free = [], 256
    for byte in range(256):
        names.append(chr(byte if byte in printable else next_free))
        next_free += byte not in printable
    return names
