# SPDX-License-Identifier: Apache-2.0
"""Our scores beside those of pycocoevalcap, lmms-eval and LAVIS, on the stored predictions of runs.

Answers with one gold answer are scored as GQA's, too.

    mmq eval tiny-blip2-caption --out out/caption && mmq eval tiny-llava --tasks vqa --out out/vqa
    python tests/harness_table.py out/caption out/vqa

Packages that are not installed are left out. The last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_metrics_harnesses import (
    lavis_gqa,
    lavis_scorer,
    lmms_captions,
    lmms_gqa,
    lmms_scorer,
)

from mmq_evals.metrics import cider, gqa_accuracy, meteor
from mmq_evals.metrics.tokenize import sanitize
from mmq_evals.predictions import read_json
from mmq_evals.score import score_result

Line = tuple[str, str, str, float, float]


def captions(task: str, rows: list[dict[str, Any]], ours: dict[str, Any]) -> Iterator[Line]:
    """Corpus scores of pycocoevalcap, on its own tokenizer's tokens."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    refs = {row["id"]: [{"caption": text} for text in row["references"]] for row in rows}
    hyps = {row["id"]: [{"caption": sanitize(row["prediction"])}] for row in rows}
    tokens = PTBTokenizer().tokenize(refs), PTBTokenizer().tokenize(hyps)
    bleu = Bleu(4).compute_score(*tokens, verbose=0)[0]
    theirs = {f"bleu_{order}": bleu[order - 1] for order in range(1, 5)}
    theirs["cider"] = Cider().compute_score(*tokens)[0]
    theirs["rouge_l"] = Rouge().compute_score(*tokens)[0]
    theirs["meteor"] = Meteor().compute_score(*tokens)[0]
    texts = {row["id"]: row["references"] for row in rows}
    given = {row["id"]: row["prediction"] for row in rows}
    # Document frequencies of the scored images: they know no table of a whole split.
    mine = {name: found["value"] for name, found in ours.items()}
    mine |= {"cider": cider(texts, given).corpus, "meteor": meteor(texts, given).corpus}
    for name, value in theirs.items():
        yield task, name, "pycocoevalcap", mine[name], float(value)
    names = {
        "bleu_1": "Bleu_1", "bleu_4": "Bleu_4", "cider": "CIDEr", "rouge_l": "ROUGE_L",
        "meteor": "METEOR",
    }  # fmt: skip
    try:
        found = lmms_captions(texts, given, list(names.values()))
    except pytest.skip.Exception:
        return
    for name, theirs_name in names.items():
        yield task, name, "lmms-eval flickr30k", mine[name], found[theirs_name]


def answers(task: str, rows: list[dict[str, Any]], ours: dict[str, Any]) -> Iterator[Line]:
    """VQA accuracy of ten answers; one answer stands for ten equal ones, as in easy-vqa's tasks."""
    scorers = {
        "official-2017": ("LAVIS", lavis_scorer),
        "always": ("lmms-eval vqav2", lambda: lmms_scorer("vqav2")),
        "m4c": ("lmms-eval textvqa", lambda: lmms_scorer("textvqa")),
    }
    for protocol, (name, make) in scorers.items():
        try:
            score = make()
        except pytest.skip.Exception:
            continue
        given = [(row["prediction"], row["answers"]) for row in rows]
        values = [score(text, gold if len(gold) > 1 else gold * 10) for text, gold in given]
        mine = ours[f"accuracy_{protocol}"]["value"]
        yield task, f"accuracy_{protocol}", name, mine, statistics.mean(values)
    one = [(row["prediction"], row["answers"][0]) for row in rows if len(row["answers"]) == 1]
    for protocol, name, load in (
        ("lavis", "LAVIS", lavis_gqa),
        ("lmms-eval", "lmms-eval gqa", lmms_gqa),
    ):
        try:
            exact = load()
        except pytest.skip.Exception:
            continue
        if one:
            mine = statistics.mean(gqa_accuracy(*pair, protocol) for pair in one)
            yield task, f"gqa {protocol}", name, mine, statistics.mean(exact(*pair) for pair in one)


def main(folders: list[str]) -> None:
    table: list[Line] = []
    for folder in map(Path, folders):
        for task, report in score_result(folder).items():
            rows = read_json(folder / f"{task}.jsonl")
            if report["kind"] in ("captions", "vqa"):
                compare = captions if report["kind"] == "captions" else answers
                table += compare(task, rows, report["scores"])
    print(f"{'task':<12}{'metric':<24}{'harness':<20}{'ours':>10}{'theirs':>10}")
    for task, metric, name, mine, value in table:
        print(f"{task:<12}{metric:<24}{name:<20}{100 * mine:>10.4f}{100 * value:>10.4f}")
    print(json.dumps({"rows": table}))


if __name__ == "__main__":
    main(sys.argv[1:])
