"""Tokenizers made for a test."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from helpers.models import word_tokenizer


def byte_level(texts: list[str], trim: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose tokens carry the space before a word; `trim` leaves it out of the offsets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def ending_tokenizer() -> PreTrainedTokenizerFast:
    """Words; documents begin with <bos> and end with `g`, which stands in for EOS."""
    tokenizer = word_tokenizer(bos=True)
    ends = [("<bos>", 2), ("g", 11)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A g", special_tokens=ends)
    return tokenizer
