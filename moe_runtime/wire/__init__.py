"""Messages and tensors to bytes and back, with every length checked before anything is allocated."""
