"""What is done to a network beside training it: each technique a package of its own."""
