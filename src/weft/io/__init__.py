"""Saving and loading: weft models as ordinary Hugging Face directories, and the adapter formats of others."""
