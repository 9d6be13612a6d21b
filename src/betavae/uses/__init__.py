"""What a trained VAE is for. Each use is one file that nothing else needs."""
