# SPDX-License-Identifier: Apache-2.0
"""GQA accuracy: equality with the one gold answer, under five normalisations. Never containment.

``lavis`` normalises both sides with LAVIS's rules of VQA. LAVIS 1.0.2 itself leaves the gold answer
as it is, so that "t-shirt" or "two" can never be right there; elsewhere both are equal.
"""

from __future__ import annotations

import string

from mmq_evals.errors import EvalError
from mmq_evals.metrics.vqa import normalize_words, strip_punctuation

PROTOCOLS = ("official", "llava", "lavis", "lmms-eval", "vlmevalkit")

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def gqa_accuracy(prediction: str, answer: str, protocol: str = "official") -> float:
    """1.0 if the prediction equals the gold answer under ``protocol``, else 0.0.

    Args:
        prediction: raw model output.
        answer: the one gold answer.
        protocol: one of `PROTOCOLS`.

    Raises:
        EvalError: unknown protocol, or an answer that is not a string.
    """
    for text in (prediction, answer):
        if not isinstance(text, str):
            raise EvalError(f"GQA: expected answers to be strings, got {text!r}")
    if protocol == "official":
        equal = prediction == answer
    elif protocol == "llava":
        equal = prediction.rstrip(".").lower() == answer
    elif protocol == "lavis":
        equal = _lavis(prediction) == _lavis(answer)
    elif protocol == "lmms-eval":
        equal = _lmms_eval(prediction) == _lmms_eval(answer)
    elif protocol == "vlmevalkit":
        equal = prediction.strip().lower() == answer.strip().lower()
    else:
        raise EvalError(f"GQA protocol: expected one of {PROTOCOLS}, got {protocol!r}")
    return float(equal)


def _lavis(text: str) -> str:
    return normalize_words(strip_punctuation(text))


def _lmms_eval(text: str) -> str:
    return text.lower().translate(_DELETE_PUNCTUATION)
