"""Explore the latent spaces of trained models on a web page; see docs/explorer.md.

`queries.py` computes what the page shows, `uploads.py` reads the user's pictures, `server.py` serves `page/`.
"""
