"""Distillation losses on top of a vocabulary-parallel LM head."""
