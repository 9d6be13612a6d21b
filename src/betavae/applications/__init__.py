"""What a trained model is for. Each file can be removed without harm to the others."""
