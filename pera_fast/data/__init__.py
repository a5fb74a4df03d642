"""The data engine: turns a folder of image files into uint8 or uint16 crops and view parameters.

docs/architecture.md "How a step flows" shows it within a training step.
"""
