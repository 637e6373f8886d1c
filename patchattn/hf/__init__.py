"""Hugging Face transformers: the only part of the library that knows it."""
