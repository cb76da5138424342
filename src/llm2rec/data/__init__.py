"""Tables, readers, named sources, sequences and embeddings: everything that is not a model."""
