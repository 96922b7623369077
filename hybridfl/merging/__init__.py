"""Merging as functions on tensors; methods in ``hybridfl.methods`` decide when they are called."""
