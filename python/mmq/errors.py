# SPDX-License-Identifier: Apache-2.0
"""The base of the project's errors: something that came was not what was expected."""

from __future__ import annotations


class MmqError(ValueError):
    """Bad input, refused. The message is one line: what was expected, what came, and where."""
