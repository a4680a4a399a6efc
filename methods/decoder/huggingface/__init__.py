"""Hugging Face checkpoint folders: read into our decoder, and written from it.

Reading parses config.json and safetensors itself; transformers is not needed.
"""
