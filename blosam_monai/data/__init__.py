"""From files to tensors and back: readers, writers, data lists, embeddings, phantoms."""
