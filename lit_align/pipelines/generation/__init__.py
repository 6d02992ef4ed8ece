"""Answers of a model to files of questions."""

from lit_align.pipelines.generation.generate import generate_answers

__all__ = ["generate_answers"]
