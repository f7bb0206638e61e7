# SPDX-License-Identifier: Apache-2.0
"""The one error of the evaluation package."""

from __future__ import annotations


class EvalError(ValueError):
    """Bad input, refused. The message is one line: what was expected, what came, and where."""
