# SPDX-License-Identifier: Apache-2.0
"""The error of the evaluation package, a kind of mmq's own."""

from __future__ import annotations

from mmq.errors import MmqError


class EvalError(MmqError):
    """Bad input of an evaluation: a dataset, an image, a metric's arguments. One line."""
