"""A page to explore the latent spaces of trained models in a browser, see docs/explorer.md.

`explored.py` computes, `picture.py` reads what its user uploads, `server.py` answers the page (`page.*`).
"""
