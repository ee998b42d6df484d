"""Makes the default tokenizer from the default corpus.

    python -m llmpilot_workload_generator.prompts.tokenizer_training PATH

Invariant: the same corpus gives the same file, byte for byte.
"""

import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llmpilot_workload_generator.prompts.corpus import default_corpus, words_of

VOCABULARY_SIZE = 4096
_BARE_WORD_COUNT = 5
"""How often each word is shown without a space before it, so that it is one token at the beginning of a text, too."""
_END_OF_TEXT = "<|endoftext|>"


def train_tokenizer() -> str:
    """Return the tokenizer.json of a byte-level BPE like GPT-2's, with far fewer entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[_END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = default_corpus()
    tokenizer.train_from_iterator([corpus, "\n".join(words_of(corpus) * _BARE_WORD_COUNT)], trainer)
    return tokenizer.to_str(pretty=False)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(train_tokenizer() + "\n", encoding="utf-8")
