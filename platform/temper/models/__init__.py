"""Models: temper's own small networks, and those of torchvision, transformers and the user, built by name."""
