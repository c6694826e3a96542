"""What is measured of a model (quality, multiple choice, speed, memory, energy), and the report made of it."""
