# SPDX-License-Identifier: Apache-2.0
"""The report of a study: one HTML file that needs nothing else, or Markdown with PNG charts."""
