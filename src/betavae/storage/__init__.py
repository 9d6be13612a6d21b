"""Files: atomic writes, an on-disk cache and a safe reader."""
