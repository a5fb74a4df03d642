"""From a folder of image files to uint8 crops and view parameters: index, read, decode, crop.

docs/architecture.md "How a step flows" shows it within a training step.
"""
