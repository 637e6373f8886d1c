"""Moments of keys, and the softmax mass they predict: of the prompt itself, or of other text."""
