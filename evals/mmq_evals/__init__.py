# SPDX-License-Identifier: Apache-2.0
"""Evaluation of vision-language models: captioning, retrieval and visual question answering."""
