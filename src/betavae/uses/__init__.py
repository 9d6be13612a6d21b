"""What a trained model is for. Each file can be removed without the others noticing."""
