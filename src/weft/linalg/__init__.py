"""Pure functions on tensors. W is (out, in) as in `torch.nn.Linear`; r is a rank; no modules, no state."""
