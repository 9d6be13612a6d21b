"""How good a trained model is: pure functions of tensors."""
