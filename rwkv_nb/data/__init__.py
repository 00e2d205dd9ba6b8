"""Text becomes documents (tokens and loss mask), documents become batches."""
