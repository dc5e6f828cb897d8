"""Sequences over the stages of a model: steps, decoding, pipeline, rebuilding."""
