"""The vocabulary of a tokenizer: which ids are tokens, and whether two tokenizers mean the same by them."""

from __future__ import annotations

import hashlib

from transformers import PreTrainedTokenizerBase

from common.model_files import ModelError

_LEAST_TOKENS = 16  # a tokenizer without its files still has its special tokens


def token_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids below this one are tokens; a model's further rows are padding, and mean nothing."""
    return max(tokenizer.get_vocab().values()) + 1


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuse a tokenizer that is not the model's.

    Raises:
        ModelError: it has hardly any tokens, or ones for which the embedding, of `rows`, has no row.
    """
    vocabulary = tokenizer.get_vocab()
    added = set(tokenizer.added_tokens_decoder)
    plain = {token: number for token, number in vocabulary.items() if number not in added}
    if len(plain) < _LEAST_TOKENS:
        raise ModelError(
            f"has an empty tokenizer ({type(tokenizer).__name__} with {len(plain)} tokens beside the special ones): "
            "its files are missing (tokenizer.json, tokenizer.model, or vocab.json and merges.txt); copy them from the "
            "model's repository"
        )
    last = max(plain, key=plain.__getitem__)
    if plain[last] >= rows:
        raise ModelError(
            f"has a tokenizer with ids up to {plain[last]} ({last!r}) and an embedding of {rows} rows; give the "
            "tokenizer that belongs to the model"
        )


def first_difference(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    """The first token, by id, that does not mean the same to both, in words; empty if all do, mask tokens left out."""
    masks = {tokenizer.mask_token, other.mask_token}
    ours, theirs = ({t: i for t, i in each.get_vocab().items() if t not in masks} for each in (tokenizer, other))
    different = {token: number for token, number in (theirs | ours).items() if ours.get(token) != theirs.get(token)}
    if not different:
        return ""
    token = min(different, key=different.__getitem__)
    return f"{token!r} is {_id_in(ours, token)} in the one and {_id_in(theirs, token)} in the other"


def _id_in(vocabulary: dict[str, int], token: str) -> str:
    return str(vocabulary[token]) if token in vocabulary else "no token"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the vocabulary without the mask token: equal for teacher and student if ids mean the same."""
    vocabulary = {t: i for t, i in tokenizer.get_vocab().items() if t != tokenizer.mask_token}
    lines = "\n".join(f"{i}\t{t}" for t, i in sorted(vocabulary.items(), key=lambda item: item[1]))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
