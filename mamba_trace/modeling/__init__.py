"""Hugging Face's modules made hookable: blocks and mixers that offer their sites to the running trace."""
