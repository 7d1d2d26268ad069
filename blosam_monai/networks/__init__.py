"""Things with weights: SAM at any size, its prompt-free decoder, low-rank adaptation, adapters on disk."""
