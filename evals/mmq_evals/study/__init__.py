# SPDX-License-Identifier: Apache-2.0
"""The study as a tool: grids of runs, what their results say, and a report of it."""
