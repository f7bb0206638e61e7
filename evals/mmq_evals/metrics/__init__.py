# SPDX-License-Identifier: Apache-2.0
"""Metrics as pure functions of strings and arrays, each usable without the rest."""

from mmq_evals.metrics.caption import (
    BleuScores,
    CaptionScores,
    DocumentFrequency,
    bleu,
    bleu_from_statistics,
    cider,
    document_frequency,
    rouge_l,
)
from mmq_evals.metrics.gqa import gqa_accuracy
from mmq_evals.metrics.java import meteor, spice
from mmq_evals.metrics.retrieval import RecallScores, best_rank, chance_recall, recall_at_k
from mmq_evals.metrics.tokenize import get_tokenizer, sanitize, tokenize_py
from mmq_evals.metrics.vqa import exact_match, vqa_accuracy

__all__ = [
    "BleuScores",
    "CaptionScores",
    "DocumentFrequency",
    "RecallScores",
    "best_rank",
    "bleu",
    "bleu_from_statistics",
    "chance_recall",
    "cider",
    "document_frequency",
    "exact_match",
    "get_tokenizer",
    "gqa_accuracy",
    "meteor",
    "recall_at_k",
    "rouge_l",
    "sanitize",
    "spice",
    "tokenize_py",
    "vqa_accuracy",
]
