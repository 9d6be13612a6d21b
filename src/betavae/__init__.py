"""betavae: train, sweep, watch, sample and trust a (β-)VAE."""
