# SPDX-License-Identifier: Apache-2.0
"""What every caption metric does first: match hypotheses with references, and tokenize both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from mmq_evals.errors import EvalError
from mmq_evals.metrics.tokenize import Tokens, tokenize_all

References = Mapping[str, Sequence[str]] | Sequence[Sequence[str]]
Hypotheses = Mapping[str, str] | Sequence[str]

T = TypeVar("T")


def tokenize_pairs(
    references: References, hypotheses: Hypotheses, tokenizer: str
) -> tuple[dict[str, list[Tokens]], dict[str, Tokens]]:
    """Tokens of the references and of the hypothesis of every image, in the hypotheses' order.

    Raises:
        EvalError: no images, a hypothesis that is not one string, an image without references, a
            reference that is not a string, different ids, or an unknown tokenizer.
    """
    named = _checked_hypotheses(hypotheses)
    refs = _checked_references(references)
    if refs.keys() != named.keys():
        odd = sorted(refs.keys() ^ named.keys())
        raise EvalError(
            f"captions: expected equal ids, got {len(refs)} with references and {len(named)} with "
            f"hypotheses; in one only: {odd[:5]}"
        )
    flat = [text for texts in refs.values() for text in texts]
    tokens = tokenize_all([*flat, *named.values()], tokenizer)
    hyps = dict(zip(named, tokens[len(flat) :], strict=True))
    return _grouped(refs, tokens[: len(flat)]), hyps


def tokenize_references(references: References, tokenizer: str) -> dict[str, list[Tokens]]:
    """Tokens of every reference, by image; raises as `tokenize_pairs`."""
    refs = _checked_references(references)
    return _grouped(refs, tokenize_all([t for texts in refs.values() for t in texts], tokenizer))


def _grouped(
    refs: Mapping[str, Sequence[str]], tokens: Sequence[Tokens]
) -> dict[str, list[Tokens]]:
    rest = iter(tokens)
    return {image_id: [next(rest) for _ in texts] for image_id, texts in refs.items()}


def _checked_hypotheses(hypotheses: Hypotheses) -> Mapping[str, str]:
    if isinstance(hypotheses, str):
        raise EvalError("hypotheses: expected a mapping or a list of captions, got one string")
    named = _named(hypotheses)
    if not named:
        raise EvalError("captions: expected at least one image, got none")
    for image_id, text in named.items():
        if not isinstance(text, str):
            raise EvalError(
                f"image {image_id!r}: expected one hypothesis string, got {type(text).__name__}"
            )
    return named


def _checked_references(references: References) -> Mapping[str, Sequence[str]]:
    if isinstance(references, str):
        raise EvalError("references: expected a mapping or a list of lists, got one string")
    named = _named(references)
    for image_id, texts in named.items():
        if isinstance(texts, str) or len(texts) == 0:
            raise EvalError(f"image {image_id!r}: expected a list of references, got {texts!r}")
        for text in texts:
            if not isinstance(text, str):
                raise EvalError(
                    f"image {image_id!r}: expected references to be strings, got "
                    f"{type(text).__name__}"
                )
    return named


def _named(values: Mapping[str, T] | Sequence[T]) -> Mapping[str, T]:
    if isinstance(values, Mapping):
        return values
    return {str(index): value for index, value in enumerate(values)}
