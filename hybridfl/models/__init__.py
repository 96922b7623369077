"""Small nets written for federated simulation; a model is one file here and one YAML in ``conf/model``.

The classifier of every net is its attribute ``head``; methods that give the server a classifier of its own rely on it.
"""
