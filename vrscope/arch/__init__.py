"""Architectures as data: flow declarations, the spaces they define, and their binding to a checkpoint."""
