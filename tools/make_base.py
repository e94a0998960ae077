"""Write the architecture and the tokenizer of the embedded bases; `make base` runs this, then pretrains the weights."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen3Config

from forethought.config import load
from forethought.data.worlds import load_world
from forethought.models.loading import EMBEDDED, save_thinking_options

PAD, BEGIN, UNKNOWN = "<pad>", "<s>", "<unk>"
BASES = {"embedded": ("cups", "quickstart"), "embedded:notes": ("notes", "quickstart-notes")}


def main() -> None:
    for name, (world, config) in BASES.items():
        write(load_world(world).vocabulary(), EMBEDDED[name])
        save_thinking_options(EMBEDDED[name], load(config))


def write(vocabulary: list[str], folder: Path) -> None:
    words = [PAD, BEGIN, UNKNOWN, *vocabulary]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, words.index(BEGIN))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BEGIN, unk_token=UNKNOWN, model_max_length=256
    ).save_pretrained(folder)
    Qwen3Config(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,
        pad_token_id=words.index(PAD),
        bos_token_id=words.index(BEGIN),
        eos_token_id=None,
    ).save_pretrained(folder)


if __name__ == "__main__":
    main()
