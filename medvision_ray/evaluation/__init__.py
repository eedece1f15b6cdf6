"""Evaluation: what a model's predictions are worth on labelled images, with intervals over patients."""
