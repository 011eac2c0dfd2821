"""The public name of data/drawn/visual_questions.py: drawn pictures with questions and answers."""

from .drawn.visual_questions import VisualQuestions, documents, vocabulary

__all__ = ["VisualQuestions", "documents", "vocabulary"]
