# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as they are on disk."""
