# SPDX-License-Identifier: Apache-2.0
"""The study as a tool: sweeps of settings, and what their table says."""
