# SPDX-License-Identifier: Apache-2.0
"""Times of caption scoring without Java: pytest --benchmark-only tests/bench"""

import pytest
from bench.caption_cases import captions

from mmq_evals.metrics import bleu, cider, rouge_l
from mmq_evals.score import score_captions

METRICS = {"cider": cider, "bleu": bleu, "rouge_l": rouge_l, "all, with intervals": score_captions}


@pytest.mark.parametrize("metric", METRICS)
def test_captions(benchmark, metric):
    refs, hyps = captions()
    benchmark.group = "5,000 captions x 5 references"
    benchmark.pedantic(METRICS[metric], (refs, hyps), rounds=3, warmup_rounds=1)
