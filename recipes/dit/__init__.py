"""A text-to-image Diffusion Transformer on a published version."""
