"""The machinery under the method: files, caches, processes, decoding. Nothing here knows a
script."""
