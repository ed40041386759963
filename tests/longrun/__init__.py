"""Long runs: 1,000 steps of training, 100,000 calls of ever other shapes, tensors past 2^31 elements. In short in `make test`."""
