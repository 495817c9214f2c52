"""Groups -> packed rows -> microbatches: the border between lists and tensors."""
