"""temper: trains networks well and cheaply on a Ray cluster."""

__version__ = "0.1.0"
