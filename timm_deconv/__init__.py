"""Network deconvolution as a timm plugin."""
