"""Few-step text to image with Qwen-Image and FLUX; see README.md in this folder."""
