"""The sparse network: maps, layers, engines, and how they are made from a dense model."""
